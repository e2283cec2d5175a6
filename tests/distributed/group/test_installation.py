"""What a job could not import is said before it starts; packages are where ComfyUI has them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mount import ROOT, SUPPORT
from wan_pack.distributed.group import installation
from wan_pack.distributed.group.installation import INSTALLATIONS, PACKAGES, check_installation, installation_problem
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.libraries import library_check

GOOD = {"missing": "", "error": "", "because": ""}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Each question to a process; its answers are good unless `answers` says otherwise. Nothing is known before."""
    monkeypatch.setattr(installation, "_good", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(installation, "_really_ask", installation._ask, raising=False)
    questions: list[list[str]] = []

    def ask(modules: Any, source: Any) -> dict[str, dict[str, str]]:
        questions.append(list(modules))
        return {module: dict(GOOD) for module in modules}

    monkeypatch.setattr(installation, "_ask", ask)
    return questions


def answers(monkeypatch: pytest.MonkeyPatch, **found: dict[str, str]) -> None:
    monkeypatch.setattr(
        installation, "_ask", lambda modules, source: {module: GOOD | found.get(module, {}) for module in modules}
    )


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = {re.split(r"[<>=; ]", line)[0] for line in lines if line and not line.startswith("#")}
    assert named == set(PACKAGES.values())


def test_the_registrys_dependencies_are_those_of_the_requirements():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def listed(name: str) -> list[str]:
        lines = (ROOT / name).read_text().splitlines()
        return [line.replace('"', "'") for line in lines if line and not line.startswith("#")]

    assert project["dependencies"] == listed("requirements.txt")
    # Nothing is pinned: torch stays the one that ComfyUI has.
    assert not any(re.search("[=<~!]=|<", line.replace(">=", "")) for line in project["dependencies"])
    # Built from source, it would fail an installation of everything by one command.
    assert not any("deepspeed" in line for line in project["dependencies"])
    assert project["optional-dependencies"]["deepspeed"] == listed("requirements-deepspeed.txt")


def test_missing_packages_come_with_the_command(monkeypatch: pytest.MonkeyPatch):
    answers(monkeypatch, diffusers={"missing": "diffusers"}, imageio_ffmpeg={"missing": "imageio_ffmpeg"})
    monkeypatch.setattr(installation, "_found", lambda module: "")
    with pytest.raises(JobError, match=r"^not installed .*: diffusers, imageio-ffmpeg; run .* -m pip install"):
        check_installation(encodes=True, decodes=True)


def test_what_comfyui_finds_in_a_place_that_is_not_handed_on_is_named(monkeypatch: pytest.MonkeyPatch):
    answers(monkeypatch, ftfy={"missing": "ftfy"})
    monkeypatch.setattr(installation, "_found", lambda module: "packages" if module == "ftfy" else "")
    with pytest.raises(JobError, match=r"pip install ftfy\. ComfyUI itself finds ftfy in packages, which is no"):
        check_installation(encodes=True, decodes=False)


def test_of_what_a_process_said_before_it_ended_the_end_is_shown(monkeypatch: pytest.MonkeyPatch):
    """There the reason is; what libraries print of their own is left out."""
    printed = b'a banner\n{"module": "torch", "missing": "", "error": "", "because": ""}\n'
    said = SimpleNamespace(stdout=printed, stderr=b"first words " + b"x" * 500 + b" last words\n", returncode=-11)
    monkeypatch.setattr(installation, "ask_program", lambda *_, **__: said)
    found = installation._really_ask(["torch", "ftfy", "diffusers"], os.environ)  # type: ignore[attr-defined]
    assert found["torch"] == GOOD and "diffusers" not in found
    error = found["ftfy"]["error"]
    assert "ended with exit code -11" in error and error.endswith(f": {'x' * 489} last words")


def test_a_package_is_found_in_the_folder_that_is_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("whole_package/__init__.py", "one_file.py", "no_package/data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = [installation._found(name) for name in ("whole_package", "one_file", "no_package", "nothing_of_this_name")]
    assert found == [str(tmp_path), str(tmp_path), "", ""]
    # As of a module that somebody has put together by hand.
    monkeypatch.setitem(sys.modules, "by_hand", types.ModuleType("by_hand"))
    sys.modules["by_hand"].__spec__ = None
    assert installation._found("by_hand") == ""


@pytest.mark.parametrize(
    ("what", "further"),
    [
        ({}, set()),
        ({"decodes": True}, {"imageio-ffmpeg"}),
        ({"looks": True}, {"transformers"}),
        ({"encodes": True}, {"transformers", "sentencepiece", "ftfy"}),
        ({"encodes": True, "looks": True}, {"transformers", "sentencepiece", "ftfy"}),
    ],
    ids=["latents", "a video", "CLIP", "a prompt", "a prompt and CLIP"],
)
def test_a_job_is_refused_for_a_package_that_it_imports_and_for_no_other(
    what: dict[str, bool], further: set[str], monkeypatch: pytest.MonkeyPatch
):
    """Of all packages one at a time is missing."""
    monkeypatch.setattr(installation, "_found", lambda module: "")
    monkeypatch.setattr(installation, "_stamp", lambda source: None)
    refused = set()
    for module, package in PACKAGES.items():
        monkeypatch.setattr(installation, "_good", {})
        answers(monkeypatch, **{module: {"missing": module}})
        try:
            check_installation(**{"encodes": False, "decodes": False, **what})
        except JobError as error:
            assert f" -m pip install {package}" in str(error)
            refused.add(package)
    assert refused == {"torch", "safetensors", "diffusers"} | further


def test_a_job_that_imports_more_asks_for_what_is_not_known_yet(asked: list[list[str]]):
    check_installation(encodes=False, decodes=False)
    check_installation(encodes=True, decodes=True)
    first, second = asked
    assert not set(first) & set(second) and sorted(first + second) == sorted(PACKAGES)


def test_a_broken_package_is_named_with_what_breaks_it(monkeypatch: pytest.MonkeyPatch):
    answers(monkeypatch, transformers={"error": "OSError: undefined symbol", "because": "torchaudio does not fit"})
    with pytest.raises(JobError, match=r"^transformers is installed, but cannot be imported: torchaudio does not fit"):
        check_installation(encodes=True, decodes=False)
    answers(monkeypatch, diffusers={"error": "TypeError: no"})
    monkeypatch.setattr(installation, "_good", {})
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(JobError, match=r"^diffusers is .*: install diffusers again, or another version of it"):
        check_installation(encodes=False, decodes=False)


def test_what_was_good_is_kept_until_something_is_installed(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    places = tmp_path / "site-packages"
    places.mkdir()
    monkeypatch.setattr(installation, "_found", lambda module: str(places))
    for _ in range(2):
        assert installation_problem() == ""
    # As after a new start of ComfyUI.
    monkeypatch.setattr(installation, "_good", {})
    assert installation_problem() == ""
    assert len(asked) == 1
    (places / "new").mkdir()
    os.utime(places, ns=(1, 1))
    assert installation_problem() == ""
    assert len(asked) == 2
    # Other places of packages are another installation.
    assert installation_problem(source={**os.environ, "PYTHONPATH": str(tmp_path)}) == ""
    assert len(asked) == 3
    # Each is known to both: ComfyUI and the doctor may take turns.
    for source in (os.environ, {**os.environ, "PYTHONPATH": str(tmp_path)}):
        monkeypatch.setattr(installation, "_good", {})
        assert installation_problem(source=source) == ""
    assert len(asked) == 3
    (stamp,) = (tmp_path / "cache" / "wan-distributed").glob("imports-*.json")
    # Damaged, of a version before, or by anybody.
    for number, text in enumerate(("[", '{"good": ["torch"]}', '{"good": {}}'), 4):
        stamp.write_text(text)
        monkeypatch.setattr(installation, "_good", {})
        assert installation_problem() == ""
        assert len(asked) == number
    (key,) = json.loads(stamp.read_text())["good"]
    stamp.write_text(json.dumps({"good": {key: 7}}))
    monkeypatch.setattr(installation, "_good", {})
    assert installation_problem() == "" and len(asked) == 7


def test_of_many_places_the_last_are_kept(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def ask(number: int) -> None:
        monkeypatch.setattr(installation, "_good", {})
        (tmp_path / str(number)).mkdir(exist_ok=True)
        installation_problem(source={**os.environ, "PYTHONPATH": str(tmp_path / str(number))})

    for number in range(INSTALLATIONS + 1):
        ask(number)
    first = len(asked)
    ask(1)
    assert len(asked) == first == INSTALLATIONS + 1
    ask(0)
    assert len(asked) == first + 1


def test_what_was_bad_is_asked_again(monkeypatch: pytest.MonkeyPatch, asked: list[list[str]]):
    good = installation._ask
    answers(monkeypatch, ftfy={"error": "broken"})
    assert "ftfy" in installation_problem()
    monkeypatch.setattr(installation, "_ask", good)
    assert installation_problem() == ""
    assert asked == [["ftfy"]]


def test_a_torchaudio_of_another_torch_is_blamed(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise OSError("/x/site-packages/torchaudio/lib/libtorchaudio.so: undefined symbol: aoti_torch_abi_version")

    versions = {"torch": "2.15.0+cu130", "torchaudio": "2.11.0+cu130"}
    monkeypatch.setattr(library_check.importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(library_check.importlib.metadata, "requires", lambda name: None)
    monkeypatch.setitem(library_check.IMPORTS, "transformers", broken)
    found = library_check.check("transformers")
    assert found["error"].startswith("OSError: ") and not found["missing"]
    assert found["because"] == (
        "torchaudio 2.11.0+cu130 does not work with torch 2.15.0+cu130: install torch 2.11.0 with it, or take "
        "torchaudio out"
    )
    versions["torchvision"] = "0.26.0"
    monkeypatch.setattr(library_check.importlib.metadata, "requires", lambda name: ["numpy", "torch==2.11.0"])
    monkeypatch.setitem(library_check.IMPORTS, "transformers", lambda: exec_in("site-packages/torchvision/ops.py"))
    assert "torchvision 0.26.0 does not work" in library_check.check("transformers")["because"]
    monkeypatch.setitem(library_check.IMPORTS, "transformers", lambda: {}["a torchaudio"])
    assert library_check.check("transformers")["because"] == ""


def exec_in(path: str) -> None:
    """Raises in a function of that file."""
    raise RuntimeError(f'File "{path}", line 1: operator torchvision::nms does not exist')


@pytest.mark.processes
def test_a_process_like_a_rank_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of PYTHONPATH counts, a relative one does not; a process that dies is an answer, too."""
    for name, text in {
        "sentencepiece": "import os; os._exit(7)",
        "ftfy": "raise ImportError('built for another')",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    ask = installation._really_ask  # type: ignore[attr-defined]
    source = {**os.environ, "PYTHONPATH": f"{tmp_path}:relative"}
    found = ask(["ftfy", "imageio_ffmpeg", "no_such_package"], source)
    assert found["ftfy"] == GOOD | {"error": "ImportError: built for another"}
    assert found["imageio_ffmpeg"] == GOOD and found["no_such_package"]["missing"] == "no_such_package"
    monkeypatch.chdir(tmp_path)
    assert ask(["ftfy"], {**os.environ, "PYTHONPATH": ".:"})["ftfy"] == GOOD
    assert "ended with exit code 7" in ask(["sentencepiece", "ftfy"], source)["sentencepiece"]["error"]


ELSEWHERE = """
import json, sys
sys.path.extend(json.loads(sys.argv[3]))
sys.path.insert(0, sys.argv[4])
from mount import mount_pack
mount_pack()
from pathlib import Path
from jobs import run_tiny, tiny_job
from wan_pack.distributed.doctor.system import package_findings
print(*(finding.level for finding in package_findings()))
job = tiny_job(Path(sys.argv[1]), text="a cat", gpu_count=1, steps=2)
result = run_tiny(job, Path(sys.argv[2]))
print(result.info["video"]["frames"])
result.remove()
"""


@pytest.mark.ranks
def test_packages_that_are_not_in_pythons_own_folders(tiny_models: Path, tmp_path: Path):
    """A Python without any package makes a video, as ComfyUI itself runs with others: half of them are in a folder of
    PYTHONPATH, the others in one that is in sys.path only."""
    bare, named, added = (tmp_path / name for name in ("bare", "named", "added"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    (packages,) = {entry for entry in sys.path if entry.endswith("-packages")}
    for folder in (named, added):
        folder.mkdir()
    for entry in Path(packages).iterdir():
        # All that a job imports is needed: torch and transformers are in one, diffusers and safetensors in the other.
        folder = named if entry.name.startswith(("torch", "transformers", "sentencepiece", "imageio")) else added
        (folder / entry.name).symlink_to(entry)
    ended = subprocess.run(
        [bare / "bin" / "python", "-c", ELSEWHERE, tiny_models, tmp_path, json.dumps([str(added)]), SUPPORT / "jobs"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": f"{named}:{SUPPORT}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.stdout.split() == ["ok", "5"], ended.stderr[-3000:]
