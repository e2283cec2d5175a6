"""torchrun's agent: starts one process per rank, ends all if one fails, and dies with ComfyUI.

ComfyUI holds the other end of this process's standard input. When that closes - ComfyUI cancels, ends, crashes or is
killed - everything below is killed at once; the ranks themselves die with this process (`die_with_parent`).
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from .jobdir import JobDir
from .processes import Process, descendants


def main(folder: JobDir) -> int:
    """Runs the ranks of the job in `folder`. Returns the exit code."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    job = folder.read_job()
    os.environ["WAN_AGENT_PID"] = str(os.getpid())
    try:
        run(parse_args(_torchrun_arguments(folder, job.parallel.gpu_count)))
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "exitcode": failure.exitcode, "signal": _signal_name(failure.exitcode)}
            for rank, failure in error.failures.items()
        ]
        folder.write_json(folder.failures, {"failures": failures})
        return 1
    return 0


def _torchrun_arguments(folder: JobDir, processes: int) -> list[str]:
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
        f"--log-dir={folder.logs / 'torchrun'}",
        str(Path(__file__).resolve().parent / "__main__.py"),
        "worker",
        str(folder.path),
    ]


def _signal_name(exitcode: int) -> str | None:
    return signal.Signals(-exitcode).name if exitcode < 0 else None


def _end_with_stdin() -> None:
    # The raw descriptor: a buffered reader here would make Python abort when it exits normally.
    while os.read(0, 4096):
        pass
    for process in descendants(os.getpid()):
        process.kill()
    own = Process.of(os.getpid())
    assert own is not None
    own.kill()
