"""What a rank tells the launcher: sign of life, progress, its own exception."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..group.last_words import leave_words
from ..job.job_folder import JobDir
from ..machine.bell import ring
from ..machine.processes import Process

log = logging.getLogger(__name__)

MAX_TRACEBACK = 8 << 10
MAX_MESSAGE = 16 << 10
MIN_INTERVAL = 0.2
"""Seconds between two writes while loading, which reports thousands of tensors."""


class RankFiles:
    """The files of one rank."""

    def __init__(self, folder: JobDir, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._process = Process.of(os.getpid())
        self.phase = "start"
        self.step = 0
        self._written = 0.0
        self._failed = False
        self.spans: list[tuple[str, float, float]] = []
        """Name, when it began in seconds since 1970, and seconds that it took, of what a start consists of. Some run
        side by side."""

    def progress(
        self, phase: str, step: int, total: int, *, seconds_per_step: float | None = None, message: str = ""
    ) -> None:
        """Where this rank is; a sign of life. Rank 0's is what the user sees.

        Args:
            phase: start, encode, load, denoise, decode, write or done.
            total: steps of the phase, 0 if unknown.
        """
        now, same_phase = time.monotonic(), phase == self.phase
        self.phase, self.step = phase, step
        if same_phase and phase == "load" and step not in (0, total) and now - self._written < MIN_INTERVAL:
            return
        self._written = now
        assert self._process is not None
        alive = {"pid": self._process.pid, "started": self._process.started, "phase": phase, "step": step}
        if self._rank == 0:
            progress = {"phase": phase, "step": step, "total": total}
            progress |= {"seconds_per_step": seconds_per_step, "message": message}
            self._folder.write_json(self._folder.progress, progress)
        # Last: when all ranks say there that they are done, the folder goes.
        self._folder.write_json(self._folder.alive(self._rank), alive)
        if phase == "done":
            ring(self._folder.done_bell)

    def say(self, message: str, done: int = 0, total: int = 0) -> None:
        """What is done within the phase. The log has all of it; who looks at the file misses what is soon over."""
        if message and not total:
            log.info(message)
        self.progress(self.phase, done, total, message=message)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Notes how long what is done within takes, on any thread."""
        start = time.time()
        try:
            yield
        finally:
            self.spans.append((name, start, time.time() - start))

    def own_start(self) -> None:
        """Notes how long this process has been there: until Python ran this."""
        assert self._process is not None
        ticks = self._process.started / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks
        self.spans.append(("process", time.time() - age, age))

    def error(self, error: BaseException) -> None:
        """Keeps the exception, in the rank's own words. The first one: later ones are its consequences."""
        if self._failed:
            return
        self._failed = True
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        text = "".join(traceback.format_exception(error))
        record = {
            "rank": self._rank,
            "type": name,
            "message": str(error)[:MAX_MESSAGE],
            "phase": self.phase,
            "step": self.step,
            "traceback": text[-MAX_TRACEBACK:],
            "time_ns": time.time_ns(),
        }
        # Into its log first: who hears of it ends this process, which may have to wait for others before it could.
        with contextlib.suppress(OSError):
            print(text, end="", file=sys.stderr, flush=True)
        leave_words(self._folder.error(self._rank), record)

    def end_process(self, error: BaseException) -> NoReturn:
        """Keeps the exception and ends this process, whatever its other threads do."""
        self.error(error)
        os._exit(1)
