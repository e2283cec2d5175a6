"""Host memory whose pages are locked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from wan_pack.distributed.parallel.page_locks import take_host, unlock_pages


def resident_kib(address: int) -> int:
    """Of the mapping that the address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError(f"no mapping has {address:#x}")


def test_all_pages_are_there_before_they_are_locked(monkeypatch: pytest.MonkeyPatch):
    """CUDA would bring them in one after the other, on one thread."""
    locked: list[tuple[int, int]] = []

    class Cudart:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
            locked.append((size, resident_kib(pointer)))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    nbytes = (64 << 20) + 1
    assert take_host(nbytes, locked=True).numel() == nbytes
    ((size, resident),) = locked
    assert size == nbytes and resident >= 64 << 10
    assert take_host(8, locked=False).numel() == 8 and len(locked) == 1


def test_memory_that_cannot_be_locked_leaves_no_error_for_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """CUDA reports a failed call once more, at the next check: something must take it before a forward does."""
    pending: list[str] = []

    class Cudart:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
            pending.append("cudaErrorNotPermitted")
            return 800

        def cudaHostUnregister(self, pointer: int) -> int:
            pending.append("cudaErrorHostMemoryNotRegistered")
            return 713

    def ones(*shape: int, device: str) -> None:
        if pending:
            raise RuntimeError(f"CUDA error: {pending.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch, "ones", ones)
    host = take_host(8, locked=True)
    assert not pending
    assert "could not be page-locked" in caplog.text
    unlock_pages(host)
    assert not pending
