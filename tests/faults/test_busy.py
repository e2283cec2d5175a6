"""A cancel on a busy machine: what it does not wait for, counted rather than timed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import Watch, gone_within, run_stub, stub_job
from patience import AT_ONCE
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.machine import gpus, nvidia_smi, prerequisites, processes
from wan_pack.distributed.machine.cancelling import cancelled_by
from wan_pack.distributed.machine.processes import Process, kill_all
from wan_pack.distributed.machine.programs import ask_program
from wan_pack.nodes.host import host
from wan_pack.wan.text.text_encoder import load_text_encoder

LONG = 600
"""Seconds that a program takes which is not waited for."""


def sleeping_program(path: Path) -> Path:
    """Its pid is in a file beside it."""
    path.write_text(f"#!/bin/sh\necho $$ > {path}.pid\nexec sleep {LONG}\n")
    path.chmod(0o755)
    return path


def ended(program: Path) -> bool:
    process = Process.of(int(Path(f"{program}.pid").read_text()))
    return process is None or gone_within(AT_ONCE, process)


def once_started(program: Path) -> Callable[[], bool]:
    """A cancel that comes while the program runs."""
    pid = Path(f"{program}.pid")
    return lambda: pid.exists() and bool(pid.read_text())


@pytest.mark.processes
def test_fault_37_a_cancel_does_not_wait_for_the_check_of_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = sleeping_program(tmp_path / "ffmpeg")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    # Neither for its own limit, which a busy machine may need.
    monkeypatch.setattr(prerequisites, "FFMPEG_TIMEOUT", 2.0 * LONG)
    started = time.monotonic()
    with pytest.raises(JobCancelled):
        run_stub(tmp_path, stub_job(), cancelled=once_started(program))
    assert time.monotonic() - started < LONG / 2
    assert ended(program)
    assert not (tmp_path / "jobs").exists()


def test_fault_37_a_cancel_does_not_wait_for_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = sleeping_program(tmp_path / "nvidia-smi")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT", 2.0 * LONG)
    started = time.monotonic()
    with pytest.raises(JobCancelled), cancelled_by(once_started(program)):
        gpus.list_gpus()
    assert time.monotonic() - started < LONG / 2
    assert ended(program)


@pytest.mark.processes
def test_a_program_gets_its_input_and_is_read_to_its_end():
    """More than a pipe holds, over several looks for a cancel."""
    echo = "import sys, time; data = sys.stdin.buffer.read(); time.sleep(0.3); sys.stdout.buffer.write(data)"
    sent = bytes(range(128)) * 8192
    done = ask_program([sys.executable, "-c", echo], given=sent, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, sent, b"")
    with pytest.raises(subprocess.TimeoutExpired):
        ask_program([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.3)


def test_fault_37_killed_processes_are_not_listed_again_while_they_end(monkeypatch: pytest.MonkeyPatch):
    """To list all processes of a busy machine takes time that the killed ones need to end."""
    looks: list[int] = []
    dying = SimpleNamespace(alive=lambda: looks.append(1) or len(looks) < 15, kill=lambda: None)
    lists: list[int] = []

    def list_processes() -> list[Any]:
        lists.append(len(looks))
        return [dying] if len(looks) < 15 else []

    monkeypatch.setattr(processes, "SECONDS_BEFORE_THE_NEXT_LOOK", LONG)
    assert kill_all(list_processes, 10 * LONG) == []
    assert len(lists) == 3, "once to kill, twice to see that nothing is left"


@pytest.mark.processes
def test_fault_37_what_is_older_than_the_group_is_not_looked_into(
    stub_pack: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stub_pack("deaf peer", delay=LONG)
    read, looked = Path.read_bytes, []

    def read_bytes(path: Path) -> bytes:
        looked.append(str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    # All of the group may have ended before anybody looks; this one has not.
    younger: list[subprocess.Popen[bytes]] = []
    watch = Watch(tmp_path, lambda folder: younger.append(subprocess.Popen(["sleep", str(LONG)])))
    try:
        with pytest.raises(JobCancelled):
            run_stub(tmp_path, on_progress=watch, cancelled=lambda: bool(watch.at))
        assert f"/proc/{younger[0].pid}/environ" in looked
        assert younger[0].poll() is None, "it is not of the group"
    finally:
        for process in younger:
            process.kill()
            process.wait()
    # Such as this one, which is ComfyUI there.
    assert f"/proc/{os.getpid()}/environ" not in looked


@pytest.mark.parametrize("calls", [1, 5])
def test_fault_37_a_cancel_ends_the_reading_of_a_text_encoder(tiny_models: Path, calls: int):
    """Before each tensor, of eleven gigabytes in all."""
    (file,) = (tiny_models / "text_encoders").glob("tiny_umt5.safetensors")
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == calls:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        load_text_encoder([file], check=check)
    assert len(asked) == calls


def test_fault_37_a_cancel_ends_the_encoding_of_a_prompt(tiny_models: Path):
    (file,) = (tiny_models / "text_encoders").glob("tiny_umt5.safetensors")
    pressed: list[int] = []
    computed: list[int] = []

    def check() -> None:
        if pressed:
            raise JobCancelled

    encoder = load_text_encoder([file], check=check)
    first, *others = encoder.model.encoder.block
    assert others
    first.register_forward_hook(lambda *_: pressed.append(1))
    others[0].register_forward_hook(lambda *_: computed.append(1))
    with pytest.raises(JobCancelled):
        encoder.encode(["a fox"])
    assert not computed


@pytest.mark.parametrize(
    ("cuda", "left", "collections"), [(False, 1 << 30, 0), (True, 32 << 20, 0), (True, 1 << 30, 1)]
)
def test_fault_37_comfyui_is_not_stopped_to_collect_nothing(
    cuda: bool, left: int, collections: int, monkeypatch: pytest.MonkeyPatch
):
    """A collection holds up every thread of ComfyUI, and what it holds up longest is a cancel."""
    done: list[str] = []
    management = SimpleNamespace(
        current_loaded_models=["weightless"],
        unload_all_models=lambda: done.append("unloaded"),
        soft_empty_cache=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace(model_management=management))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    monkeypatch.setattr(gc, "collect", lambda: done.append("collected"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    # What models hold until they are unloaded is nothing to collect.
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: (left if done else 60 << 30) if gpu else 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    host.free_memory()
    assert done == ["unloaded"] + ["collected"] * collections
