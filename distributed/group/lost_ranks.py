"""Ranks that are gone before the job is done, seen without torchrun's agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ..job.job_folder import JobDir
from ..machine.processes import signal_name
from .failures import RankFailure
from .signs_of_life import Seen

PATIENCE = 1.8
"""Seconds that the agent has, which knows better, to say so and to end the other ranks."""


class LostRanks:
    """Those whose process has ended, or that have left an error and still do not end."""

    def __init__(self, folder: JobDir) -> None:
        self._folder = folder
        self._since: dict[int, float] = {}
        self._codes: dict[int, int] = {}
        self.failures: list[RankFailure] = []
        """What is known of each that was lost while the agent lived."""

    def look(self, ranks: Mapping[int, Seen], agent_lives: Callable[[], bool] = lambda: True) -> bool:
        """Whether one has been lost for longer than the agent may need. To be asked every 0.1 s.

        Args:
            ranks: what is known now of those that run on this machine.
            agent_lives: whether their agent does, asked after they were looked at: they die with it.
        """
        now = time.monotonic()
        lost = {
            rank: seen
            for rank, seen in ranks.items()
            if seen.phase != "done" and (seen.gone or self._folder.error(rank).exists())
        }
        if lost and not agent_lives():
            return False
        for rank, seen in lost.items():
            self._since.setdefault(rank, now)
            # Only until the agent asks for it is there an answer.
            if (code := seen.process.exit_code()) is not None:
                self._codes[rank] = code
        self.failures = [self._failure(rank, seen) for rank, seen in lost.items()]
        return any(now - self._since[rank] >= PATIENCE for rank in lost)

    def _failure(self, rank: int, seen: Seen) -> RankFailure:
        code = self._codes.get(rank)
        name = None if code is None else signal_name(code)
        return RankFailure(rank=rank, exitcode=code, signal=name, phase=seen.phase, step=seen.step)
