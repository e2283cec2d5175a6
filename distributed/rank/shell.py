"""The shell around a rank: waits for jobs, logs to their files, keeps its exception, dies with the agent.

Imports torch last.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from ..group.group_folder import GroupDir
from ..job.job_folder import JobDir
from ..machine.processes import AGENT_VARIABLE, die_with_parent
from .rank_log import redirect_to, set_up_logging
from .signs import RankFiles

if TYPE_CHECKING:
    from .session import Session

LOOK_AGAIN = 5.0
"""Seconds after which a rank looks for its next job although nobody rang."""


def main(group: GroupDir) -> NoReturn:
    """Runs the rank that torchrun's environment names, job after job, and ends the process."""
    die_with_parent(int(os.environ[AGENT_VARIABLE]))
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
        from .worker import main as run_worker

        return run_worker(group, folder, files, session), job.parallel.stays
    except BaseException as error:
        files.error(error)
        raise


def _wait_for_job(group: GroupDir, number: int) -> JobDir:
    with group.bell(int(os.environ["RANK"])) as bell:
        while (folder := group.read_request(number)) is None:
            bell.wait(LOOK_AGAIN)
    return folder
