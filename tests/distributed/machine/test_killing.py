"""What is killed, and how often it is looked for: processes that are only made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from wan_pack.distributed.machine import processes
from wan_pack.distributed.machine.processes import Process, kill_all


class Made:
    """A process. lives: how many times it is to be killed before it ends."""

    def __init__(self, lives: float = 1) -> None:
        self.lives = lives

    def alive(self) -> bool:
        return self.lives > 0

    def kill(self) -> None:
        self.lives -= 1


def test_all_are_killed_and_also_what_they_started_meanwhile(monkeypatch: pytest.MonkeyPatch):
    """Until two looks in a row find nothing: what has only been forked is not known as the group's yet."""
    monkeypatch.setattr(processes, "SECONDS_BEFORE_THE_NEXT_LOOK", 0)
    rank, agent, child, late = (Made() for _ in range(4))
    looks: list[list[Made]] = [[rank, agent], [child], [], [late], [], []]
    listing: Any = lambda: looks.pop(0)  # noqa: E731
    assert kill_all(listing, 600) == []
    assert not looks and not any(one.alive() for one in (rank, agent, child, late))


def test_what_cannot_be_killed_is_named(monkeypatch: pytest.MonkeyPatch):
    stuck, ended = Made(lives=float("inf")), Made()
    listing: Any = lambda: [stuck, ended]  # noqa: E731
    assert kill_all(listing, 0) == [stuck, ended]
    assert kill_all(listing, 0) == [stuck], "the other one has ended by now"


def test_what_has_ended_is_not_signalled():
    """A listing may be old: its pid may be another process by now."""
    gone = Made(lives=0)
    listing: Any = lambda: [gone]  # noqa: E731
    assert kill_all(listing, 600) == [] and gone.lives == 0


def test_a_process_is_known_by_more_than_its_pid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_stat", lambda pid: ("R", 1, 700) if pid == 5 else None)
    seen = Process.of(5)
    assert seen is not None and seen.alive() and Process.of(6) is None
    monkeypatch.setattr(processes, "_stat", lambda pid: ("R", 1, 701))
    assert not seen.alive()
    for state in "ZX":
        monkeypatch.setattr(processes, "_stat", lambda pid, state=state: (state, 1, 700))
        assert not seen.alive(), "it only waits to be reaped"


@pytest.mark.parametrize(("timeout", "looks"), [(1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.1, [0.0, 0.1])])
def test_what_does_not_end_is_looked_for_now_and_then_as_long_as_is_said(
    timeout: float, looks: list[float], monkeypatch: pytest.MonkeyPatch
):
    """By all processes of the machine: not over and over, also when one of several has ended."""
    clock = SimpleNamespace(now=50.0, slept=[])
    stuck, ended = Made(lives=float("inf")), Made()
    seen: list[float] = []

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds

    def listing() -> Any:
        seen.append(clock.now - 50.0)
        return [stuck, ended]

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    assert kill_all(listing, timeout) == [stuck]
    assert seen == pytest.approx(looks, abs=0.06) and set(clock.slept) == {0.01}
