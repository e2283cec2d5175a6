"""Mounts the pack as `wan_pack`, so that tests run from any folder and without ComfyUI."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_report import FaultReport
from kept_memory import keep_freed_memory
from kinds import Kinds
from mount import GOLDEN, mount_pack
from patience import AT_ONCE

mount_pack()
keep_freed_memory()
# Two cores, several processes: more threads each only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FaultReport())
    config.pluginmanager.register(Kinds(config), "kinds")


def pytest_collection() -> None:
    # As ranks do: otherwise the first test that imports diffusers has it import all else that is installed.
    from wan_pack.distributed.libraries.library_imports import import_diffusers

    import_diffusers()
    # What is imported from here on stays: there is no garbage to look for.
    gc.disable()


def pytest_collection_finish() -> None:
    # Thousands of tests and all of torch stay until the end: no collection of garbage walks through them again.
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Inputs and outputs of the official code."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as files in ComfyUI's model folders."""
    from wan_pack.demo.tiny_model import write_comfyui_files

    folder = tmp_path_factory.mktemp("models")
    write_comfyui_files(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _nothing_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """The no-orphan promise, everywhere: no process works in the test's folder, no job or group is left there."""
    # Asked for before the test: after it the folder's own fixture may be torn down already.
    folder = str(request.getfixturevalue("tmp_path")) if "tmp_path" in request.fixturenames else None
    kinds = request.config.pluginmanager.get_plugin("kinds")
    before = kinds.started
    yield
    if folder is None:
        return
    # To look at all processes of the machine takes longer than most tests do.
    if kinds.started > before or any(map(request.node.get_closest_marker, ("processes", "ranks"))):
        # Killed ones need a busy machine's processors to end; one that nobody has killed stays.
        deadline = time.monotonic() + AT_ONCE
        while (left := _working_in(folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, "processes left behind:\n" + "\n".join(left)
    folders = [path for path in Path(folder).rglob("wan-*") if path.name.startswith(("wan-job-", "wan-group-"))]
    assert not folders, f"folders left behind: {folders}"


def _working_in(folder: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            place = os.readlink(process / "cwd")
        except OSError:
            continue
        if folder in command or place.startswith(folder):
            found.append(f"{process.name}: {command} (in {place})")
    return found


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a script in the place of nvidia-smi."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(script: str) -> None:
        (folder / "nvidia-smi").write_text(script)
        (folder / "nvidia-smi").chmod(0o755)

    return put


@pytest.fixture
def gpu_locks_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where GPUs are locked, instead of the machine's own."""
    from wan_pack.distributed.machine import gpu_locks

    folder = tmp_path / "locks"
    folder.mkdir()
    monkeypatch.setattr(gpu_locks, "_folder", lambda: folder)
    return folder


@pytest.fixture
def pool(gpu_locks_folder: Path) -> Iterator[Any]:
    """Groups that wait end with the test."""
    from wan_pack.distributed.launch.pool import Pool

    pool = Pool()
    yield pool
    pool.release()
