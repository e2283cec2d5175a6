"""How long a program is waited for, and what becomes of one that is not: a program that is made up."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.machine import nvidia_smi, programs
from wan_pack.distributed.machine.cancelling import cancelled_by, check_cancelled
from wan_pack.distributed.machine.programs import ask_program


class Pipe:
    """Whose end is closed; one that is full says so."""

    def __init__(self, full: bool = False) -> None:
        self.full, self.closed = full, False

    def close(self) -> None:
        self.closed = True
        if self.full:
            raise BrokenPipeError


class Program:
    """On a clock of its own, which runs only while somebody waits for it.

    Args:
        seconds: until it ends by itself.
        killable: it ends when it is killed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, *, killable: bool = True) -> None:
        self.now, self.seconds, self.killable = 100.0, 100.0 + seconds, killable
        self.given: list[Any] = []
        self.waits: list[float] = []
        self.killed, self.started = False, {}
        self.args, self.returncode = ["program"], 7
        self.stdin, self.stdout, self.stderr = Pipe(full=True), Pipe(), Pipe()
        monkeypatch.setattr(programs, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(programs.subprocess, "Popen", self._start)

    def _start(self, command: Any, **how: Any) -> Program:
        self.started = {"command": command, **how}
        return self

    def _pass(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now = min(self.now + seconds, max(self.now, self.seconds))
        if self.now < self.seconds:
            raise subprocess.TimeoutExpired(self.args, seconds)

    def communicate(self, given: bytes | None, seconds: float) -> tuple[bytes, bytes]:
        self.given.append(given)
        self._pass(seconds)
        return b"said", b"errors"

    def kill(self) -> None:
        self.killed = True
        if self.killable:
            self.seconds = self.now

    def wait(self, seconds: float) -> None:
        self._pass(seconds)


def test_a_program_runs_where_and_with_what_is_said_and_is_given_its_input_once(monkeypatch: pytest.MonkeyPatch):
    program = Program(monkeypatch, 0.25)
    done = ask_program(["program", "x"], timeout=5.0, given=b"in", environment={"A": "1"}, folder=Path("/tmp"))
    assert (done.args, done.returncode, done.stdout, done.stderr) == (["program", "x"], 7, b"said", b"errors")
    assert program.given == [b"in", None, None] and not program.killed
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    assert program.started == {"command": ["program", "x"], "env": {"A": "1"}, "cwd": Path("/tmp"), **pipes}


@pytest.mark.parametrize("killable", [True, False])
def test_one_that_takes_too_long_is_killed_and_hardly_waited_for(killable: bool, monkeypatch: pytest.MonkeyPatch):
    """One inside a driver does not end even so; what it holds open here is closed, whatever that says."""
    program = Program(monkeypatch, 600.0, killable=killable)
    with pytest.raises(subprocess.TimeoutExpired) as error:
        ask_program(["program"], timeout=0.45)
    assert error.value.timeout == 0.45 and program.killed
    assert program.waits == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.05, 1.0])
    assert all(pipe.closed for pipe in (program.stdin, program.stdout, program.stderr))


def test_without_any_time_it_is_looked_at_once(monkeypatch: pytest.MonkeyPatch):
    program = Program(monkeypatch, 600.0)
    with pytest.raises(subprocess.TimeoutExpired):
        ask_program(["program"], timeout=-1.0)
    assert program.waits == [0.0, 1.0]


def test_a_cancel_is_looked_for_all_the_while_and_ends_it(monkeypatch: pytest.MonkeyPatch):
    program = Program(monkeypatch, 600.0)
    with cancelled_by(lambda: program.now > 100.25), pytest.raises(JobCancelled, match="cancelled before the job"):
        ask_program(["program"], timeout=5.0)
    assert program.killed and program.now < 100.35
    # It was asked for inside only.
    check_cancelled()


@pytest.mark.parametrize(("asked", "seconds"), [(None, nvidia_smi.TIMEOUT), (2.5, 2.5), (0.0, 0.0)])
def test_nvidia_smi_is_asked_for_lines_of_values(asked: float | None, seconds: float, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[list[str], float]] = []

    def answer(code: int) -> Callable[..., Any]:
        def ask(command: list[str], *, timeout: float) -> Any:
            calls.append((command, timeout))
            return subprocess.CompletedProcess(command, code, b"0, H100 \xff\n1,  A100\n", b"no driver")

        return ask

    monkeypatch.setattr(nvidia_smi, "ask_program", answer(0))
    assert nvidia_smi.query("gpu", "index", "name", timeout=asked) == [["0", "H100 \ufffd"], ["1", "A100"]]
    assert calls == [
        (["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader,nounits"], seconds)
    ]  # fmt: skip
    monkeypatch.setattr(nvidia_smi, "ask_program", answer(9))
    with pytest.raises(subprocess.CalledProcessError) as error:
        nvidia_smi.ask("topo")
    assert (error.value.returncode, error.value.cmd) == (9, ["nvidia-smi", "topo"])
    assert (error.value.output, error.value.stderr) == ("0, H100 \ufffd\n1,  A100\n", "no driver")
