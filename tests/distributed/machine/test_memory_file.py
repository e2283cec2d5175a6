"""Files in memory whose pages are found before they are written."""

from __future__ import annotations

import mmap
import resource

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
    before = faults()
    memory[PART] = bytes(PART.stop - PART.start)
    with_pages = faults() - before
    before = faults()
    memory[PART.stop :] = bytes(SIZE - PART.stop)
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
