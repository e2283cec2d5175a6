"""What is said of packages that a job could not import, by a process whose answers are made up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wan_pack.distributed.group import installation
from wan_pack.distributed.group.installation import check_installation
from wan_pack.distributed.job.errors import JobError


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, str]]:
    """Module -> what the process says of it; of all others that they are good."""
    answers: dict[str, dict[str, str]] = {}

    def ask(command: list[str], *, timeout: float, folder: Path, environment: dict[str, str]) -> Any:
        assert command[:4] == [sys.executable, "-u", str(installation.DISTRIBUTED), "imports"] and folder.is_dir()
        assert environment["CUDA_VISIBLE_DEVICES"] == "" and timeout == 180
        if "slow" in answers:
            raise subprocess.TimeoutExpired(command, timeout)
        good = {"missing": "", "error": "", "because": ""}
        lines = [json.dumps({"module": name} | good | answers.get(name, {})) for name in command[4:]]
        return SimpleNamespace(stdout="\n".join(lines).encode(), stderr=b"", returncode=0)

    monkeypatch.setattr(installation, "ask_program", ask)
    monkeypatch.setattr(installation, "_good", {})
    monkeypatch.setattr(installation, "_found", lambda module: "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return answers


def test_of_several_that_comfyui_finds_elsewhere_one_says_enough(said: Any, monkeypatch: pytest.MonkeyPatch):
    said |= {name: {"missing": name} for name in ("ftfy", "transformers")}
    places = {"ftfy": "some", "transformers": "other"}
    monkeypatch.setattr(installation, "_found", lambda module: places.get(module, ""))
    words = r"pip install transformers ftfy\. ComfyUI itself finds transformers in other, which is no [^.]* its own$"
    with pytest.raises(JobError, match=words):
        check_installation(encodes=True, decodes=False)


def test_packages_that_take_too_long_are_named(said: Any):
    said["slow"] = {}
    with pytest.raises(JobError, match=r"^torch, safetensors, diffusers could not be imported within 180 s: look at"):
        check_installation(encodes=False, decodes=False)


def test_of_a_long_error_the_beginning_is_shown(said: Any):
    said["diffusers"] = {"error": "TypeError: " + "x" * 600}
    with pytest.raises(JobError, match=r"^diffusers is .*: install diffusers again, .* \(TypeError: x{489}\)$"):
        check_installation(encodes=False, decodes=False)


def test_what_is_good_is_kept_in_one_file_for_this_python(said: Any, tmp_path: Path):
    check_installation(encodes=False, decodes=False)
    (stamp,) = (tmp_path / "wan-distributed").iterdir()
    assert re.fullmatch(r"imports-[0-9a-f]{12}\.json", stamp.name)
    (good,) = json.loads(stamp.read_text())["good"].values()
    assert set(good) == {"torch", "safetensors", "diffusers"}
