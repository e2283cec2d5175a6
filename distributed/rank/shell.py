"""The shell around a rank: waits for jobs, logs to their files, keeps its exception, dies with the agent.

Imports torch last.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..group.group_folder import GroupDir
from ..job.job_folder import JobDir
from ..libraries.cuda_driver import make_context
from ..libraries.library_imports import uncollected
from ..libraries.triton_key import make_triton_key
from ..machine.bell import Bell
from ..machine.processes import AGENT_VARIABLE, die_with_parent
from .signs import RankFiles

if TYPE_CHECKING:
    from .session import Session

FORMAT = "%(asctime)s rank {rank} %(phase)-7s | %(message)s"
"""Of every line of the log, the pack's own and libraries'."""
SWITCH_INTERVAL = 0.0005
"""Seconds that a thread may wait for Python while another one computes in it; Python's own is 0.005. Threads that read
weights ask for it after every piece of a few milliseconds, while the main one imports."""
LOOK_AGAIN = 5.0
"""Seconds after which a rank looks for its next job although nobody rang."""


def main(group: GroupDir) -> NoReturn:
    """Runs the rank that torchrun's environment names, job after job, and ends the process."""
    die_with_parent(int(os.environ[AGENT_VARIABLE]))
    sys.setswitchinterval(SWITCH_INTERVAL)
    session: Session | None = None
    for number in itertools.count(1):
        folder = _wait_for_job(group, number)
        rank = int(os.environ["RANK"])
        redirect_to(folder.log(rank))
        # Python's stack of a rank that is stuck, on request of the launcher.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        # And of one that crashes in native code.
        faulthandler.enable()
        files = RankFiles(folder, rank)
        files.progress("start", 0, 0, message="" if session else "importing PyTorch")
        if session is None:
            files.own_start()
        session, stays = _run(group, folder, files, session)
        logging.getLogger(__name__).info("done")
        files.progress("done", 0, 0)
        if not stays:
            # Not the ordinary way out: gloo's threads sometimes abort a process that is being torn down, its work done.
            logging.shutdown()
            os._exit(0)
    raise AssertionError("numbers do not end")


def _run(group: GroupDir, folder: JobDir, files: RankFiles, session: Session | None) -> tuple[Session, bool]:
    """Runs one job. Returns what to keep, and whether to wait for another."""
    try:
        job = folder.read_job()
        set_up_logging(int(os.environ["RANK"]), lambda: files.phase, verbose=job.verbose)
        if session is None and job.parallel.gpu_ids:
            make_context(int(os.environ["LOCAL_RANK"]), files.span)
            make_triton_key(files.span)
        with files.span("import of torch"), uncollected():
            from .worker import main as run_worker

        return run_worker(group, folder, files, session), job.parallel.stays
    except BaseException as error:
        files.error(error)
        # Its log has the traceback.
        raise SystemExit(1) from error


def _wait_for_job(group: GroupDir, number: int) -> JobDir:
    with Bell(group.bell(int(os.environ["RANK"]))) as bell:
        while (folder := group.read_request(number)) is None:
            bell.wait(LOOK_AGAIN)
    return folder


def redirect_to(path: Path) -> None:
    """Sends file descriptors 1 and 2, so C libraries and children too, to the end of `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def set_up_logging(rank: int, phase: Callable[[], str], *, verbose: bool) -> None:
    """This pack's lines at INFO (DEBUG if `verbose`), libraries' from WARNING on.

    Args:
        phase: where the rank is now.
    """
    logging.basicConfig(
        stream=sys.stdout, format=FORMAT.format(rank=rank), datefmt="%H:%M:%S", level=logging.WARNING, force=True
    )

    def add_phase(record: logging.LogRecord) -> bool:
        record.phase = phase()
        return True

    # On the handler: a filter of a logger does not see what its children log.
    logging.getLogger().handlers[0].addFilter(add_phase)
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.DEBUG if verbose else logging.INFO)
