"""Files in memory whose pages are found before they are written."""

from __future__ import annotations

import ctypes
import mmap
import resource
from types import SimpleNamespace
from typing import Any

import pytest
from wan_pack.distributed.machine import memory_file
from wan_pack.distributed.machine.memory_file import MemoryFile, Populating

SIZE, PART = 4 << 20, slice((1 << 20) + 8, 3 << 20)


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.fixture
def memory() -> mmap.mmap:
    file = MemoryFile("test")
    mapped = file.map(SIZE)
    file.close()
    return mapped


def test_pages_are_there_before_they_are_written(memory: mmap.mmap):
    memory[PART.start + 5000] = 7
    populating = Populating(memory, PART)
    populating._thread.join()
    # Not zeros: of those the pages may have to be found, too.
    inside, behind = b"x" * (PART.stop - PART.start), b"x" * (SIZE - PART.stop)
    before = faults()
    memory[PART] = inside
    with_pages = faults() - before
    before = faults()
    memory[PART.stop :] = behind
    without = faults() - before
    populating.stop()
    assert without > 200 and with_pages < without / 2


def test_what_is_written_meanwhile_stays(memory: mmap.mmap):
    populating = Populating(memory, PART)
    memory[PART] = b"x" * (PART.stop - PART.start)
    populating._thread.join()
    assert memory[PART] == b"x" * (PART.stop - PART.start) and not any(memory[: PART.start])


@pytest.mark.parametrize("advice", [memory_file.POPULATE_WRITE, 12345])
def test_it_ends_when_nobody_wants_it_or_the_system_does_not_know_it(
    memory: mmap.mmap, advice: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory_file, "POPULATE_WRITE", advice)
    monkeypatch.setattr(memory_file, "AT_A_TIME", mmap.PAGESIZE)
    populating = Populating(memory, PART)
    populating.stop()
    assert not populating._thread.is_alive()
    memory[PART] = bytes(PART.stop - PART.start)


@pytest.mark.parametrize("refuses", [0, 2])
def test_all_pages_of_a_part_are_asked_for_and_no_others(
    memory: mmap.mmap, refuses: int, monkeypatch: pytest.MonkeyPatch
):
    """From the one that it begins in; some at a time, and no more once the system refuses."""
    first, page = ctypes.addressof(ctypes.c_char.from_buffer(memory)), mmap.PAGESIZE
    asked: list[tuple[int, int, int]] = []

    class Madvise:
        argtypes: Any = None

        def __call__(self, at: int, size: int, advice: int) -> int:
            asked.append((at - first, size, advice))
            return int(len(asked) == refuses)

    monkeypatch.setattr(memory_file.ctypes, "CDLL", lambda name: SimpleNamespace(madvise=Madvise()))
    monkeypatch.setattr(memory_file, "AT_A_TIME", 2 * page)
    populating = Populating(memory, slice(3 * page + 8, 8 * page + 100))
    populating._thread.join()
    pieces = [(3 * page, 2 * page, 23), (5 * page, 2 * page, 23), (7 * page, page + 100, 23)]
    assert asked == pieces[: refuses or 3] and populating._thread.daemon
