"""Whether the ranks still move, and which of them holds the others up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..job.job import JobError, Parallel
from ..job.job_folder import JobDir
from ..job.progress import SHARES, place
from ..machine.processes import Process
from .logs import clean_lines

PHASES = tuple(SHARES)
BEFORE_DENOISING = ("start", "encode", "load")
MOST_SECONDS_FOR_STACKS = 5.0
"""On a busy machine, or on others. Mostly they are there at once."""
MAX_STACK_BYTES = 16 << 10
STACK_LINES = 12
_WAITING = ("distributed_c10d.py", "_functional_collectives.py", "wait_for_first_use")
"""In the stack of a rank that only waits for the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A rank's last sign of life."""

    process: Process
    phase: str
    step: int
    stopped: bool = False
    """Frozen by SIGSTOP or a debugger."""
    gone: bool = False

    @classmethod
    def of(cls, process: Process, *, phase: str, step: int, here: bool = True) -> Seen:
        """As it is now.

        Args:
            here: it runs on this machine; another one's pids mean nothing here.
        """
        return cls(
            process=process, phase=phase, step=step,
            stopped=here and process.stopped(), gone=here and not process.alive(),
        )  # fmt: skip

    @property
    def where(self) -> str:
        return place(self.phase, self.step)

    @property
    def place(self) -> tuple[int, int]:
        return (PHASES.index(self.phase) if self.phase in PHASES else 0, self.step)


@dataclass(frozen=True, slots=True)
class Problem:
    """A time-out that was exceeded."""

    setting: str
    seconds: float


class SignsOfLife:
    """Follows the files that the ranks rewrite as they move."""

    def __init__(self, folder: JobDir, parallel: Parallel) -> None:
        self._folder, self._parallel = folder, parallel
        self._seen: dict[int, int] = {}
        self._denoising = False
        self.restart()

    def restart(self) -> None:
        """Has the time-outs begin now."""
        self._start = self._last = time.monotonic()

    def problem(self) -> Problem | None:
        """The time-out that is exceeded now, if one is."""
        # By this process's own clock: the files' times jump when somebody sets the system's.
        now = time.monotonic()
        for rank in range(self._parallel.gpu_count):
            try:
                stamp = self._folder.alive(rank).stat().st_mtime_ns
            except OSError:
                continue
            if self._seen.get(rank) != stamp:
                self._seen[rank], self._last = stamp, now
                self._denoising = self._denoising or self._all_loaded()
        parallel = self._parallel
        if not self._denoising:
            late = now - self._start > parallel.start_timeout
            return Problem("start_timeout", parallel.start_timeout) if late else None
        late = now - self._last > parallel.stall_timeout
        return Problem("stall_timeout", parallel.stall_timeout) if late else None

    def all_done(self) -> bool:
        """Whether every rank has finished the job."""
        ranks = self.ranks()
        return len(ranks) == self._parallel.gpu_count and all(seen.phase == "done" for seen in ranks.values())

    def _all_loaded(self) -> bool:
        ranks = self.ranks()
        return len(ranks) == self._parallel.gpu_count and not any(
            seen.phase in BEFORE_DENOISING for seen in ranks.values()
        )

    def ranks(self) -> dict[int, Seen]:
        """What is known of each rank. One that has not come up yet is missing."""
        return read_ranks(self._folder, range(self._parallel.gpu_count), here=not self._parallel.hosts)


def read_ranks(folder: JobDir, ranks: Iterable[int], *, here: bool) -> dict[int, Seen]:
    """What is known of each of the ranks. One that has not come up yet is missing.

    Args:
        here: they run on this machine.
    """
    found = {}
    for rank in ranks:
        try:
            alive = folder.read_json(folder.alive(rank))
            process = Process(int(alive["pid"]), int(alive["started"]))
            found[rank] = Seen.of(process, phase=str(alive["phase"]), step=int(alive["step"]), here=here)
        except (JobError, LookupError, TypeError, ValueError):
            continue
    return found


def dump_stacks(
    folder: JobDir, ranks: Mapping[int, Seen], elsewhere: Callable[[], None] | None = None
) -> dict[int, str]:
    """Has every rank print where it is.

    Args:
        elsewhere: asks them where they run on other machines.
    Returns:
        the innermost frames of each main thread, innermost first.
    """
    sizes = {}
    for rank, seen in ranks.items():
        if elsewhere is not None:
            sizes[rank] = _size(folder, rank)
        # Before a rank has its handler, the signal would end it.
        elif seen.process.catches(signal.SIGUSR1) and not seen.stopped:
            sizes[rank] = _size(folder, rank)
            seen.process.kill(signal.SIGUSR1)
    if elsewhere is not None:
        elsewhere()
    _wait_for_growth(folder, sizes)
    return {rank: _stack_behind(folder, rank, size) for rank, size in sizes.items()}


def find_suspect(ranks: Mapping[int, Seen], stacks: Mapping[int, str], count: int) -> int:
    """The rank that the others wait for: the one that is furthest behind.

    Ranks at the same place differ in how they stand there: one never came up, one is frozen or has left, and one that
    waits inside a collective is a victim.
    """

    def order(rank: int) -> tuple[int, tuple[int, int], int, int]:
        seen = ranks.get(rank)
        if seen is None:
            return (0, (0, 0), 0, rank)
        waits = any(place in stacks.get(rank, "") for place in _WAITING)
        return (1, seen.place, 2 if waits else 0 if seen.stopped or seen.gone else 1, rank)

    return min(range(count), key=order)


def _wait_for_growth(folder: JobDir, sizes: Mapping[int, int]) -> None:
    """Until all these logs are larger than they were, and grow no more."""
    before, deadline = dict(sizes), time.monotonic() + MOST_SECONDS_FOR_STACKS
    while sizes and time.monotonic() < deadline:
        time.sleep(0.1)
        now = {rank: _size(folder, rank) for rank in sizes}
        if now == before and all(now[rank] > size for rank, size in sizes.items()):
            return
        before = now


def _size(folder: JobDir, rank: int) -> int:
    try:
        return folder.log(rank).stat().st_size
    except OSError:
        return 0


def _stack_behind(folder: JobDir, rank: int, size: int) -> str:
    try:
        with folder.log(rank).open("rb") as file:
            file.seek(size)
            lines = clean_lines(file.read(MAX_STACK_BYTES))
    except OSError:
        return ""
    # faulthandler marks the thread that has the signal, which is the main one; others follow or come before.
    starts = [i for i, line in enumerate(lines) if line.startswith("Current thread")]
    frames = [line for line in lines[starts[-1] + 1 :] if line.startswith("  File ")] if starts else lines
    return "\n".join(frames[:STACK_LINES])
