"""Where a process sleeps: what a bell is in the file system, and that its ends are closed once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from wan_pack.distributed.machine import bell as module
from wan_pack.distributed.machine.bell import Bell, BellRope, ring
from wan_pack.distributed.machine.memory_file import MemoryFile, OpenedMemory


class Poll:
    """In the place of select.poll: nobody rings."""

    waits: list[float] = []  # noqa: RUF012 - of all

    def register(self, descriptor: int, events: int) -> None: ...

    def poll(self, milliseconds: float) -> list[object]:
        self.waits.append(milliseconds)
        return []


def test_a_bell_with_a_name_is_the_users_own_pipe_and_may_be_there_already(tmp_path: Path):
    path = tmp_path / "bell"
    with Bell(path) as bell:
        mode = path.stat().st_mode
        assert stat.S_ISFIFO(mode) and mode & 0o777 == 0o600 and bell.path == path
        assert not os.get_blocking(bell._descriptor)
        with Bell(path):
            ring(path)
        bell.wait(600)
    assert path.exists()


def test_it_sleeps_as_long_as_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.select, "poll", Poll)
    with Bell() as bell:
        bell.wait(2.5)
    assert Poll.waits == [2500]


def test_ends_are_closed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A second time the number may be another file's."""
    file = MemoryFile("test")
    file.map(10)
    things = [Bell(tmp_path / "bell"), Bell(), file, OpenedMemory(file.path), BellRope(tmp_path / "bell")]
    closed: list[int] = []
    close = os.close
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor))[1])
    for thing in things:
        thing.close()
    assert len(closed) == len(set(closed)) == 6 and min(closed) > 2
    for thing in things:
        thing.close()
    assert len(closed) == 6


def test_what_is_no_bell_and_no_memory_is_not_left_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    closed: list[int] = []
    close = os.close
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor))[1])
    for kind, words in ((BellRope, "it is no bell"), (OpenedMemory, "it is no file in memory")):
        with pytest.raises(OSError, match=words) as error:
            kind(tmp_path / "file")
        assert error.value.filename == str(tmp_path / "file") and len(closed) == 1
        closed.clear()


def test_a_file_in_memory_grows_to_what_is_mapped_and_never_shrinks():
    file = MemoryFile("test")
    file.map(100)[:3] = b"abc"
    assert len(file.map(50)) == 50 and file.read(200) == b"abc" + bytes(97) and file.read(2) == b"ab"
    opened = OpenedMemory(file.path)
    with pytest.raises(ValueError, match=r"^a file in memory has 100 bytes; it must have 101$"):
        opened.map(101)
    opened.map(100)[99:] = b"z"
    assert file.read(200)[-1:] == b"z"
    opened.close()
    file.close()
