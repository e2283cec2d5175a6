"""What the processes of a group use now: GPU memory and time, or host memory without a GPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import nvidia_smi
from .processes import Process

TIMEOUT = 5.0
"""Seconds that nvidia-smi gets."""
INTERVAL = 2.0
FIRST = 0.5
"""Seconds before the first reading: what is over sooner, as a part of a picture, does not wait for one."""
END_TIMEOUT = 0.2
"""Seconds that the last reading gets, once nobody asks for it any more."""
STALE = 10.0
"""Seconds after which a reading says nothing any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Of one GPU, or of one process without a GPU."""

    name: str
    used_bytes: int
    total_bytes: int | None = None
    """None: of a process, which shares the host's memory."""
    percent: int | None = None
    """How busy the GPU is; None: unknown."""


def all_gpus() -> dict[str, Usage]:
    """Index and UUID -> what the GPU's users, whoever they are, use of it. Empty if nvidia-smi does not tell."""
    try:
        lines = nvidia_smi.query(
            "gpu", "index", "uuid", "memory.used", "memory.total", "utilization.gpu", timeout=TIMEOUT
        )
    except nvidia_smi.FAILURES:
        return {}
    found = {}
    for values in lines:
        if len(values) != 5 or not (values[2].isdecimal() and values[3].isdecimal()):
            continue
        index, uuid, used, total, percent = values
        found[index] = found[uuid] = Usage(
            name=f"GPU {index}",
            used_bytes=int(used) << 20,
            total_bytes=int(total) << 20,
            percent=int(percent) if percent.isdecimal() else None,
        )
    return found


def gpu_usage(gpu_ids: Iterable[str], gpus: Mapping[str, Usage]) -> list[Usage]:
    """Of these GPUs, in their order; those that are not known are missing."""
    return [gpus[name] for name in gpu_ids if name in gpus]


def process_usage(processes: Iterable[Process]) -> list[Usage]:
    """Resident memory of each process, in rank order; those that have ended are missing."""
    found = []
    for rank, process in enumerate(processes):
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):
            continue
        found.append(Usage(name=f"rank {rank}", used_bytes=pages * os.sysconf("SC_PAGE_SIZE")))
    return found


def in_words(usages: Sequence[Usage]) -> str:
    """One line however many there are: "4 GPUs: 61-63 of 80 GiB, 97-100 % busy"."""
    if not usages:
        return ""
    totals = [usage.total_bytes for usage in usages if usage.total_bytes is not None]
    kind = "GPU" if totals else "process"
    plural = "es" if kind == "process" else "s"
    who = usages[0].name if len(usages) == 1 else f"{len(usages)} {kind}{plural}"
    memory = _span([usage.used_bytes / 2**30 for usage in usages], 1)
    text = f"{who}: {memory}" + (f" of {_span([total / 2**30 for total in totals], 0)}" if totals else "") + " GiB"
    percents = [usage.percent for usage in usages if usage.percent is not None]
    return text + (f", {_span(percents, 0)} % busy" if percents else "")


def _span(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


class UsageMonitor:
    """Reads again and again on a thread of its own: a driver in trouble can keep nvidia-smi for minutes."""

    def __init__(self, read: Callable[[], list[Usage]], interval: float = INTERVAL) -> None:
        self._read, self._interval = read, interval
        self._latest: tuple[float, list[Usage]] = (0.0, [])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wan-usage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Hardly waits for a reading that is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(END_TIMEOUT)

    def _run(self) -> None:
        wait = min(FIRST, self._interval)
        while not self._stop.wait(wait):
            usages = self._read()
            self._latest = (time.monotonic(), usages)
            wait = self._interval

    def latest(self) -> list[Usage]:
        """Of the last reading; nothing if that was too long ago."""
        when, usages = self._latest
        return usages if usages and time.monotonic() - when < STALE else []
