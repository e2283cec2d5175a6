"""torchrun's agent: starts one process per rank, ends all if one fails, and dies with ComfyUI.

ComfyUI holds the other end of this process's standard input. When that closes - ComfyUI cancels, ends, crashes or is
killed - everything below is killed at once; the ranks themselves die with this process (`die_with_parent`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..job.json_files import read_json
from ..libraries.library_imports import uncollected
from ..machine.processes import AGENT_VARIABLE, Process, descendants, kill_all, members, signal_name
from .early_ranks import EarlyRanks
from .group_folder import GroupDir
from .last_words import leave_words

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

GRACE = 3
"""Seconds that the ranks get to end by themselves once one of them has failed. torchrun's own 30 would all be spent
on a rank that is frozen or ignores SIGTERM, and no rank has anything to save."""
_ENDING = threading.Event()
"""Set once this process ends everything by itself: how ranks end from then on is no news."""


def main(folder: GroupDir) -> int:
    """Runs the ranks of the group in `folder`. Returns the exit code."""
    threading.Thread(target=end_with_stdin, args=(folder.path,), daemon=True).start()
    try:
        ranks = int(read_json(folder.group)["ranks"])
        os.environ[AGENT_VARIABLE] = str(os.getpid())
        early = EarlyRanks(rank_command(folder.path), ranks)
        # After the ranks: both import torch.
        with uncollected():
            from . import rendezvous

        rendezvous.register()
        return run_ranks(folder.path, _one_machine(folder, ranks, rendezvous.BACKEND), folder.failures, early)
    except Exception as error:
        leave_words(folder.failures, {"message": f"{type(error).__name__}: {error}", "failures": []})
        raise


def run_ranks(group_folder: Path, options: Sequence[str], failures: Path, early: EarlyRanks | None = None) -> int:
    """Runs the ranks that torchrun's `options` ask for. Returns the exit code.

    Those that fail are its last words, also left in the file `failures`: at once, and again when all have ended.

    Args:
        early: the ranks, if they run already.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
    from torch.distributed.run import parse_args, run

    os.environ[AGENT_VARIABLE] = str(os.getpid())
    if early is not None:
        early.hand_over(SubprocessHandler)
    _say_and_end_soon(SubprocessContext, failures)
    try:
        run(parse_args(_torchrun_arguments(group_folder, options)))
    except ChildFailedError as error:
        _leave_failures(failures, error.failures)
        return 1
    return 0


def _leave_failures(path: Path, failures: Mapping[int, ProcessFailure]) -> None:
    if _ENDING.is_set():
        return
    ended = [
        {
            "rank": rank,
            "exitcode": failure.exitcode,
            "signal": signal_name(failure.exitcode),
            "seconds": failure.timestamp,
        }
        for rank, failure in failures.items()
    ]
    leave_words(path, {"failures": ended})


def rank_command(group_folder: Path) -> list[str]:
    """What Python is to run as a rank."""
    return [str(Path(__file__).resolve().parent.parent / "__main__.py"), "worker", str(group_folder)]


def _torchrun_arguments(group_folder: Path, options: Sequence[str]) -> list[str]:
    # torchrun replaces ${local_rank} in what it passes on, and $$ by $.
    passed_on = [argument.replace("$", "$$") for argument in rank_command(group_folder)]
    return ["--max-restarts=0", "--monitor-interval=0.1", "--rdzv-id=job", *options, *passed_on]


def _one_machine(folder: GroupDir, processes: int, backend: str) -> list[str]:
    return [
        "--nnodes=1",
        f"--nproc-per-node={processes}",
        f"--rdzv-backend={backend}",
        # Otherwise it asks the name server for this machine's full name, which can take long to fail.
        "--local-addr=127.0.0.1",
        f"--log-dir={folder.path / 'torchrun'}",
    ]


def _say_and_end_soon(context: type[Any], failures: Path) -> None:
    close = context.close

    def close_soon(self: Any, death_sig: signal.Signals | None = None, timeout: int = GRACE) -> None:
        # Before the others are ended, which may take its time: these ended by themselves.
        if self._failures:
            _leave_failures(failures, {int(self.envs[at]["RANK"]): failure for at, failure in self._failures.items()})
        close(self, death_sig, min(timeout, GRACE))

    context.close = close_soon


def end_with_stdin(group_folder: Path) -> None:
    """Waits for the end of this process's standard input, then ends everything of the group and this process."""
    wait_for_end_of_stdin()
    end_all(group_folder)


def wait_for_end_of_stdin() -> None:
    # The raw descriptor: a buffered reader here would make Python abort when it exits normally.
    while os.read(0, 4096):
        pass


def end_all(group_folder: Path, before_own_end: Callable[[], None] = lambda: None) -> None:
    """Ends everything of the group on this machine and, last, this process."""
    _ENDING.set()
    own = Process.of(os.getpid())
    assert own is not None
    below = descendants(own.pid)
    kill_all(lambda: {*below, *members(group_folder, own.started)} - {own}, 0.5)
    before_own_end()
    own.kill()
