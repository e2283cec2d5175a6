"""What is looked at before a job starts, and how it is told; no program is run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import pytest
from jobs import stub_job
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.machine import prerequisites
from wan_pack.distributed.machine.prerequisites import FFMPEG_TIMEOUT, check_space, ffmpeg_problem, writing_problem


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (SimpleNamespace(returncode=0, stderr=b"a warning"), ""),
        (
            SimpleNamespace(returncode=1, stderr=b" no libx264\n"),
            "ffmpeg cannot encode with libx264: no libx264; run pip",
        ),
        (SimpleNamespace(returncode=7, stderr=b""), "ffmpeg cannot encode with libx264: exit code 7; run pip"),
        (OSError("not there"), "ffmpeg is missing: not there; run pip install imageio-ffmpeg"),
        (RuntimeError("none found"), "ffmpeg is missing: none found; run pip install imageio-ffmpeg"),
        (
            subprocess.TimeoutExpired("ffmpeg", 1),
            f"ffmpeg did not write one frame within {FFMPEG_TIMEOUT:g} s; run pip install imageio-ffmpeg",
        ),
    ],
)
def test_ffmpeg_is_asked_for_one_frame(monkeypatch: pytest.MonkeyPatch, ends: Any, words: str):
    asked: list[list[str]] = []

    def ask(command: list[str], *, given: bytes, timeout: float) -> Any:
        assert len(given) == 64 * 64 * 3 and timeout == FFMPEG_TIMEOUT
        asked.append(command)
        if isinstance(ends, Exception):
            raise ends
        return ends

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "ffmpeg")
    monkeypatch.setattr(prerequisites, "ask_program", ask)
    said = ffmpeg_problem()
    assert said.startswith(words) and bool(said) == bool(words)
    ((_, *options),) = asked
    for pair in ("-f rawvideo", "-pix_fmt rgb24", "-s 64x64", "-i -", "-c:v libx264", "-f null"):
        assert pair in " ".join(options)


def test_a_disk_without_room_is_told_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = stub_job(width=1280, height=720, num_frames=81).made_bytes()
    needed = prerequisites.MIN_FREE_BYTES + int(1280 * 720 * 81 * (0.25 + 0.9))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    check_space({tmp_path: made})
    for free in (needed - 1, 5 << 20):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        with pytest.raises(JobError) as caught:
            check_space({tmp_path: made})
    said = f"{tmp_path} has 5 MiB free; the job needs {needed / 2**20:.0f} MiB. Free some space there"
    assert str(caught.value) == said


def test_folders_of_one_disk_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disks = {tmp_path / "jobs": 1, tmp_path / "output": 1, tmp_path / "other": 2}
    known = Path.stat

    def stat(path: Path, **options: bool) -> Any:
        return SimpleNamespace(st_dev=disks[path]) if path in disks else known(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 << 20))
    jobs, output, other = disks
    check_space({jobs: 30 << 20, other: 30 << 20})
    with pytest.raises(JobError, match=f"^{other} has 100 MiB free; the job needs 101 MiB"):
        check_space({jobs: 30 << 20, other: 37 << 20})
    with pytest.raises(JobError, match=f"^{jobs} and {output} are on one disk, which has 100 MiB free; .* 124 MiB"):
        check_space({jobs: 30 << 20, output: 30 << 20})


def test_a_folder_is_made_and_left_empty(tmp_path: Path):
    assert writing_problem(tmp_path / "a" / "b") == ""
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    assert writing_problem(tmp_path / "file").startswith(f"{tmp_path / 'file'} cannot be written to: ")


@pytest.mark.parametrize(("format_of", "hosts", "asked"), [
    (None, (), ["switches"]), ("mp4", (), ["switches", "ffmpeg"]), ("mp4", ("a", "b"), ["deepspeed", "ffmpeg"]),
])  # fmt: skip
def test_what_a_job_needs_is_asked_for_and_the_first_that_is_missing_told(
    format_of: Any, hosts: tuple[str, ...], asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Of several machines each looks at its own switches; what reaches them must be here."""
    problems: dict[str, str] = {}
    seen: list[str] = []

    def ask(name: str) -> str:
        seen.append(name)
        return problems.get(name, "")

    def switches(parallel: Any) -> None:
        if ask("switches"):
            raise ValueError("attention is 'fa3'")

    monkeypatch.setattr(prerequisites, "check_switches", switches)
    monkeypatch.setattr(prerequisites, "deepspeed_there", lambda: not ask("deepspeed"))
    monkeypatch.setattr(prerequisites, "ffmpeg_problem", lambda given: ask("ffmpeg") if given == format_of else 1 / 0)
    monkeypatch.setattr(prerequisites, "torch_problem", lambda: problems.get("torch", ""))
    parallel = stub_job(hosts=hosts).parallel
    prerequisites.check_prerequisites(parallel, file_format=format_of)
    assert seen == asked
    words = {"switches": "attention is 'fa3'", "deepspeed": "several machines are reached with DeepSpeed; run "}
    for name in asked:
        problems = {name: f"no {name}"}
        with pytest.raises(JobError, match=f"^{words.get(name, f'no {name}')}"):
            prerequisites.check_prerequisites(parallel, file_format=format_of)
    problems, seen[:] = {"torch": "torch is old"}, []
    with pytest.raises(JobError, match=r"^torch is old$"):
        prerequisites.check_prerequisites(parallel, file_format=format_of)
    assert seen == []


def test_switches_are_asked_of_the_gpus_that_were_chosen(monkeypatch: pytest.MonkeyPatch):
    """Each kind once; of one that nvidia-smi does not tell nothing is known."""
    asked: list[Any] = []
    known = {"0": (9, 0), "1": (9, 0), "2": (8, 6), "3": (7, 5)}
    monkeypatch.setattr(prerequisites, "compute_capabilities", lambda: known)
    monkeypatch.setattr(prerequisites, "check_needs", lambda parallel, capability: asked.append(capability))
    prerequisites.check_switches(stub_job(gpu_count=4, gpu_ids=("0", "1", "2", "9")).parallel)
    assert sorted(asked) == [(8, 6), (9, 0)]
    asked.clear()
    prerequisites.check_switches(stub_job().parallel)
    assert asked == [None]


@pytest.mark.parametrize(("version", "numbers"), [("2.11.0+cu130", (2, 11)), ("2.7", (2, 7)), (None, ())])
def test_the_first_two_numbers_of_torch_count(version: str | None, numbers: Any, monkeypatch: pytest.MonkeyPatch):
    def installed(name: str) -> str:
        if name != "torch" or version is None:
            raise prerequisites.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(prerequisites.importlib.metadata, "version", installed)
    assert prerequisites.torch_release() == (version or "", numbers)
    assert prerequisites.torch_problem() == ""


def test_without_imageio_ffmpeg_there_is_no_ffmpeg(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    said = ffmpeg_problem()
    assert said.startswith("ffmpeg is missing: ") and said.endswith(" libx264, or turn decode_video off")
