"""Whatever text a job carries: it is refused, or stays text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import FAKE_AGENT, run_stub, stub_job
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.job.job import Job, LoraFile, Text
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.machine import gpu_locks, gpus
from wan_pack.distributed.machine.gpu_locks import wait_for_gpus

PAYLOADS = (
    "../x", "../../../../tmp/x", "/etc/passwd", "a\0b", "-rf", "--nproc-per-node=9", "$(id)", "${local_rank}", "`id`",
    "; rm -rf / #", "| cat /etc/passwd", "\n", "\r\nX: y", "\u202egnp.exe", "\ud800", "\U0001f98a" * 50, "x" * 100_000,
    "%s%n", "{0.__class__}", "CON", "",
)  # fmt: skip


def full_job() -> Job:
    """A job with something in every field."""
    job = stub_job(gpu_ids=("0", "1"))
    loras = (LoraFile(file=job.model.vae[0], strength=1.0),)
    model = dataclasses.replace(
        job.model, text_encoder=job.model.vae, tokenizer=job.model.vae, high_noise_loras=loras, low_noise_loras=loras
    )
    return dataclasses.replace(job, model=model, text=Text(prompt="a", negative_prompt="b"), warnings=("c",))


def string_fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a job a string is: names and indices."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from string_fields(item, (*path, index))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from string_fields(getattr(value, field.name), (*path, field.name))


def with_string(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """The job with another string there. Raises ValueError as the job's own checks do."""
    if not path:
        return text
    first, *rest = path
    if isinstance(value, tuple):
        return tuple(with_string(item, tuple(rest), text) if i == first else item for i, item in enumerate(value))
    return dataclasses.replace(value, **{first: with_string(getattr(value, first), tuple(rest), text)})


FIELDS = list(string_fields(full_job()))


def test_fault_23_every_kind_of_string_is_tried():
    assert {".".join(str(part) for part in path if isinstance(part, str)) for path in FIELDS} >= {
        "id", "model.high_noise.path", "model.vae.path", "model.tokenizer.path", "model.high_noise_loras.file.path",
        "parallel.gpu_ids", "parallel.mixed_precision", "parallel.ulysses_engine", "sampling.solver", "text.prompt",
        "text.negative_prompt", "warnings",
    }  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_fault_23_24_a_string_of_a_job_is_refused_or_stays_text(
    path: tuple[Any, ...], gpu_locks_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What is taken goes all the way to a process: its command line and every file's place stay the same."""
    monkeypatch.setattr(worker_group, "AGENT", FAKE_AGENT)
    seen: list[Any] = []
    popen = worker_group.subprocess.Popen
    monkeypatch.setattr(worker_group.subprocess, "Popen", lambda argv, **kw: seen.append(argv) or popen(argv, **kw))
    taken: Job | None = None
    for payload in PAYLOADS:
        try:
            job = with_string(full_job(), path, payload)
        except ValueError as error:
            assert str(path[-1]) in str(error) or str(path[-2]) in str(error)
            continue
        folder = JobDir.create(tmp_path)
        try:
            folder.write_job(job)
            assert folder.read_job() == job
        except ValueError as error:
            assert "surrogates" in str(error)
        else:
            # One of them is enough for a process; the others take the same way.
            taken = job if payload in ("$(id)", "/etc/passwd") else taken
        finally:
            folder.remove()
    if taken is not None:
        result = run_stub(tmp_path, taken, lambda inputs: inputs.write_text("good"))
        # The others look whether this machine can make videos.
        ((python, unbuffered, agent, role, group_folder),) = [argv for argv in seen if "agent" in argv]
        assert not any(payload in argv for argv in seen for payload in PAYLOADS if payload)
        assert (python, unbuffered, agent, role) == (sys.executable, "-u", str(FAKE_AGENT), "agent")
        assert Path(group_folder).parent == tmp_path / "jobs"
        assert {entry.name for entry in result.folder.path.iterdir()} == {
            "job.json", "inputs.safetensors", "owner.lock", "latents.safetensors", "video.mp4", "result.json", "logs",
            "done-bell",
        }  # fmt: skip
        result.remove()
    assert {entry.name for entry in tmp_path.iterdir()} <= {"locks", "jobs"}


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: repr(payload[:12]))
def test_fault_23_a_gpus_name_is_no_path(payload: str, tmp_path: Path):
    (tmp_path / "locks").mkdir()
    try:
        locks = wait_for_gpus([payload], cancelled=lambda: True, on_wait=lambda text: None, folder=tmp_path / "locks")
    except gpu_locks.JobError as error:
        assert "cannot be opened" in str(error)
    else:
        locks.release()
        (file,) = (tmp_path / "locks").iterdir()
        assert file.name.startswith("gpu-") and file.name.endswith(".lock")
    assert [entry.name for entry in tmp_path.iterdir()] == ["locks"]


@pytest.mark.parametrize("payload", [text for text in PAYLOADS if text.strip()], ids=lambda text: repr(text[:12]))
def test_fault_23_gpu_ids_name_gpus_that_are_there(payload: str, monkeypatch: pytest.MonkeyPatch):
    gpu = gpus.Gpu(index="0", uuid="GPU-0", name="H200", total_bytes=1 << 37, free_bytes=1 << 37)
    monkeypatch.setattr(gpus, "list_gpus", lambda: [gpu])
    with pytest.raises(ValueError, match=r"gpu_ids is .*; it must name different GPUs"):
        gpus.choose_gpus(1, payload)


def test_fault_23_a_link_in_a_folders_place_is_not_followed(tmp_path: Path):
    """A lock that somebody replaced by a link to another file of the user."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "gpu-0.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(gpu_locks.JobError, match=r"gpu-0\.lock cannot be opened: .*; remove it"):
        wait_for_gpus(["0"], cancelled=lambda: True, on_wait=lambda text: None, folder=tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"
