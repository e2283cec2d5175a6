"""Counters in the host's memory that streams of GPUs write and wait for, of whatever process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StreamCounters:
    """On the current stream, by the driver's operations on memory.

    Raises:
        ImportError: the package cuda-bindings is missing, which comes with torch since 2.10.
    """

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver

    def write(self, counter: Tensor, value: int) -> None:
        """counter: int32, of no dimension, in memory that `lock_mapped` was given."""
        self._check(self._driver.cuStreamWriteValue32(_stream(), counter.data_ptr(), value & 0xFFFFFFFF, 0))

    def wait(self, counter: Tensor, value: int) -> None:
        """What follows on the stream begins when the counter is at least `value`, by the driver's cyclic order."""
        flags = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._check(self._driver.cuStreamWaitValue32(_stream(), counter.data_ptr(), value & 0xFFFFFFFF, flags))

    def _check(self, result: tuple[Any, ...]) -> None:
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver refuses an operation on memory of a stream: {result[0]!r}")


def lock_mapped(memory: Tensor) -> None:
    """Page-locks memory of the host that other processes have mapped too. Raises RuntimeError."""
    # 1 | 2: portable and mapped, so that streams of every device find the counters in it.
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 3))
    if code != 0:
        raise RuntimeError(f"CUDA cannot lock {memory.nbytes / 2**20:.0f} MiB of the host's memory (error {code})")


def unlock_mapped(memory: Tensor) -> None:
    """Undoes `lock_mapped`; any tensor that begins where that one did."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
