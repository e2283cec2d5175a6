"""The ranks of one machine, started before their agent imports torch, and handed to torchrun as those that it starts.

Agent and ranks import torch: one after the other, a video would wait for both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""As torchrun says it of a rendezvous that needs none (rendezvous.py)."""


class EarlyRanks:
    """Processes that run already, one for each rank, each in a session of its own as torchrun's are.

    Args:
        command: of Python, the same for all.
        count: of ranks. They must be all that there are: a rank's number is its place here.
    """

    def __init__(self, command: Sequence[str], count: int) -> None:
        world = {**MASTER, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        self._waiting = {
            str(rank): subprocess.Popen(
                [sys.executable, "-u", *command],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
            )
            for rank in range(count)
        }

    def hand_over(self, handler: type[SubprocessHandler]) -> None:
        """From now on torchrun, which starts processes by `handler`, is given these where it would start ranks.

        What it does with them stays its own: to wait for them, to see how they end, to end the others.
        """

        waiting = self._waiting

        def adopt(self: SubprocessHandler, args: tuple[Any, ...], env: dict[str, str]) -> subprocess.Popen[Any]:
            assert env["RANK"] == env["LOCAL_RANK"], "all ranks are here"
            # Each once: torchrun starts no rank again.
            return waiting.pop(env["RANK"])

        # mypy takes what stands in a class for its method.
        handler._popen = adopt  # type: ignore[method-assign]
