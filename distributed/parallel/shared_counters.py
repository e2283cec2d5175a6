"""Counters between each two ranks of a machine: how much one has sent, and what the other waits for.

They lie in the host's memory. Streams of GPUs write them and wait for them by themselves, without a kernel: a kernel,
however small, waits until that of the attention leaves it a multiprocessor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

COUNTERS = 4096
"""Bytes for those of one rank: a page."""
POLL = 5e-5
"""Seconds between two looks at a counter where no GPU waits for it."""


class SharedCounters:
    """Of the ranks of a group.

    Args:
        rank: this one's in the group.
        memory: that of each rank, uint8 [COUNTERS], zeros, mapped by all of them.
    Raises:
        ImportError: the package cuda-bindings is missing, which comes with torch since 2.10.
        RuntimeError: the driver does not let streams count.
    """

    def __init__(self, rank: int, memory: Sequence[Tensor], device: torch.device) -> None:
        self._rank = rank
        self._sent, self._waited = [0] * len(memory), [0] * len(memory)
        self._counters = [own.view(torch.int32) for own in memory]
        self._counting: _Counting = _OfStreams() if device.type == "cuda" else _OfProcesses()
        if device.type == "cuda":
            # With the counter that nobody uses: not every driver lets streams do this, and now is the time to hear it.
            own = self._counters[rank][rank]
            self._counting.write(own, 1)
            self._counting.wait(own, 1)
            torch.cuda.synchronize(device)

    def signal(self, rank: int) -> None:
        """Tells `rank` that what was queued on the current stream before is done, once it is."""
        self._sent[rank] += 1
        self._counting.write(self._counters[rank][self._rank], self._sent[rank])

    def wait(self, rank: int) -> None:
        """What follows on the current stream begins after the next `signal` of `rank`."""
        self._waited[rank] += 1
        self._counting.wait(self._counters[self._rank][rank], self._waited[rank])


class _Counting(Protocol):
    def write(self, counter: Tensor, value: int) -> None:
        """counter: int32, of no dimension."""

    def wait(self, counter: Tensor, value: int) -> None:
        """Until it is at least `value`."""


class _OfProcesses:
    def write(self, counter: Tensor, value: int) -> None:
        counter.fill_(value)

    def wait(self, counter: Tensor, value: int) -> None:
        while int(counter) < value:
            time.sleep(POLL)


class _OfStreams:
    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver

    def write(self, counter: Tensor, value: int) -> None:
        self._check(self._driver.cuStreamWriteValue32(_stream(), counter.data_ptr(), value & 0xFFFFFFFF, 0))

    def wait(self, counter: Tensor, value: int) -> None:
        # At least, in the cyclic order of 32 bits.
        flags = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._check(self._driver.cuStreamWaitValue32(_stream(), counter.data_ptr(), value & 0xFFFFFFFF, flags))

    def _check(self, result: tuple[Any, ...]) -> None:
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver refuses a stream's operation on memory: {result[0]!r}")


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
