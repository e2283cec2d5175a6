"""torchrun's agent: starts one process per rank, ends all if one fails, and dies with ComfyUI.

ComfyUI holds the other end of this process's standard input. When that closes - ComfyUI cancels, ends, crashes or is
killed - everything below is killed at once; the ranks themselves die with this process (`die_with_parent`).
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from .groupdir import GroupDir
from .json_files import read_json, write_json
from .processes import AGENT_VARIABLE, Process, descendants, kill_all, members, signal_name

GRACE = 3
"""Seconds that the ranks get to end by themselves once one of them has failed. torchrun's own 30 would all be spent
on a rank that is frozen or ignores SIGTERM, and no rank has anything to save."""


def main(folder: GroupDir) -> int:
    """Runs the ranks of the group in `folder`. Returns the exit code."""
    threading.Thread(target=_end_with_stdin, args=(folder.path,), daemon=True).start()
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    ranks = int(read_json(folder.group)["ranks"])
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    _shorten_grace(SubprocessContext)
    try:
        run(parse_args(_torchrun_arguments(folder, ranks)))
    except ChildFailedError as error:
        failures = [
            {
                "rank": rank,
                "exitcode": failure.exitcode,
                "signal": signal_name(failure.exitcode),
                "seconds": failure.timestamp,
            }
            for rank, failure in error.failures.items()
        ]
        write_json(folder.failures, {"failures": failures})
        return 1
    return 0


def _torchrun_arguments(folder: GroupDir, processes: int) -> list[str]:
    # torchrun replaces ${local_rank} in what it passes on, and $$ by $.
    script = str(Path(__file__).resolve().parent / "__main__.py")
    passed_on = [argument.replace("$", "$$") for argument in (script, "worker", str(folder.path))]
    # A rendezvous through a file: torchrun's TCP ones listen on every interface.
    return [
        "--nnodes=1",
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "--monitor-interval=0.1",
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        f"--rdzv-endpoint={folder.rendezvous}",
        "--rdzv-id=job",
        # Otherwise it asks the name server for this machine's full name, which can take long to fail.
        "--local-addr=127.0.0.1",
        f"--log-dir={folder.path / 'torchrun'}",
        *passed_on,
    ]


def _shorten_grace(context: type[Any]) -> None:
    close = context.close

    def close_soon(self: Any, death_sig: signal.Signals | None = None, timeout: int = GRACE) -> None:
        close(self, death_sig, min(timeout, GRACE))

    context.close = close_soon


def _end_with_stdin(group_folder: Path) -> None:
    # The raw descriptor: a buffered reader here would make Python abort when it exits normally.
    while os.read(0, 4096):
        pass
    own = Process.of(os.getpid())
    assert own is not None
    below = descendants(own.pid)
    kill_all(lambda: {*below, *members(group_folder)} - {own}, 0.5)
    own.kill()
