"""Runs tests on a changed file, in a fork of a process that has imported the libraries but nothing of the pack."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

LIBRARIES = (
    "torch", "numpy", "safetensors.torch", "gguf", "PIL.Image", "sentencepiece", "transformers", "imageio_ffmpeg",
    "diffusers.schedulers.scheduling_unipc_multistep", "diffusers.schedulers.scheduling_flow_match_euler_discrete",
)  # fmt: skip
QUICK = "not (processes or ranks) or video"
"""Tests that start nothing, or nothing but ffmpeg for a moment."""
LONGEST = 300.0
"""Seconds for one change; longer is an endless loop."""
MOST_MEMORY = 12 << 30
"""Bytes: a bound that is gone must not take the machine with it."""
REMOVES = {"os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.truncate": None, "shutil.rmtree": 1}
"""Event -> which of its arguments is the folder's descriptor, if it has one."""


def prepare() -> None:
    """Imports what all tests need, once."""
    for name in LIBRARIES:
        importlib.import_module(name)


def check(tests: Sequence[str], seconds: float) -> None:
    """Ends the program if a test fails here without any change."""
    with tempfile.TemporaryDirectory() as temp:
        nowhere = Path(temp, "no_file")
        if _forked(nowhere, ast.Module([], []), list(tests), Path(temp), 60 + 5 * seconds):
            raise SystemExit(Path(temp, "log").read_text(errors="replace")[-4000:])


def survives(path: Path, tree: ast.Module, tests: Sequence[str], seconds: float) -> bool:
    """Whether all `tests` pass with `tree` in the place of the file.

    Args:
        seconds: that they take without the change.
    """
    with tempfile.TemporaryDirectory() as temp:
        code = _forked(path, tree, ["-x", *tests], Path(temp), min(LONGEST, 30 + 5 * seconds))
        if code == pytest.ExitCode.USAGE_ERROR:
            # The change renames cases: all of the files then.
            files = sorted({test.partition("::")[0] for test in tests})
            code = _forked(path, tree, ["-x", *files], Path(temp), LONGEST)
    return code == 0


def _forked(path: Path, tree: ast.Module, arguments: list[str], temp: Path, seconds: float) -> int:
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setsid()
            code = _run(path, tree, arguments, temp)
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL
        time.sleep(0.02)


def _run(path: Path, tree: ast.Module, arguments: list[str], temp: Path) -> int:
    with open(temp / "log", "w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    _put(path, tree)
    work = temp / "work"
    work.mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(work)
    sys.addaudithook(_Fence(temp))
    return int(pytest.main([*arguments, "-q", "-m", QUICK, "-p", "no:cacheprovider", f"--basetemp={temp}/tests"]))


def _put(path: Path, tree: ast.Module) -> None:
    """Has the file's module be made of `tree`."""
    loader, code = importlib.machinery.SourceFileLoader, compile(tree, str(path), "exec")
    original = loader.get_code

    def get_code(self: Any, name: str) -> Any:
        # Also where a test imports it through a link.
        return code if Path(self.path).resolve() == path else original(self, name)

    loader.get_code = get_code


class _Fence:
    """A hook that keeps a change from doing harm: it kills and removes nothing but its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.killpg" or (event == "os.kill" and not self._started(arguments[0])):
            raise PermissionError(f"{event} {arguments}")
        if event in REMOVES and not self._ours(arguments, REMOVES[event]):
            raise PermissionError(f"{event} {arguments}")

    def _started(self, pid: int) -> bool:
        """This process, or one that it started."""
        if pid <= 1 or pid == os.getpid():
            return pid > 1
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
        except OSError:
            return True

    def _ours(self, arguments: tuple[Any, ...], descriptor: int | None) -> bool:
        path = arguments[0]
        if isinstance(path, int):
            return True
        folder = arguments[descriptor] if descriptor is not None else -1
        if isinstance(folder, int) and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
        path = os.path.abspath(os.fsdecode(path))
        return path.startswith(self._folder) or "__pycache__" in path
