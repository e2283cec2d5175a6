"""The shell around a rank: dies with the agent, logs to its file, keeps its exception. Imports torch last."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
from typing import NoReturn

from .jobdir import JobDir
from .processes import AGENT_VARIABLE, die_with_parent
from .rank_files import RankFiles
from .rank_log import redirect_to, set_up_logging


def main(folder: JobDir) -> NoReturn:
    """Runs the rank that torchrun's environment names, and ends the process."""
    die_with_parent(int(os.environ[AGENT_VARIABLE]))
    rank = int(os.environ["RANK"])
    redirect_to(folder.log(rank))
    # Python's stack of a rank that is stuck, on request of the launcher.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # And of one that crashes in native code.
    faulthandler.enable()
    files = RankFiles(folder, rank)
    files.progress("start", 0, 0)
    try:
        set_up_logging(rank, verbose=folder.read_job().verbose)
        from .worker import main as run_worker

        run_worker(folder, files)
    except BaseException as error:
        files.error(error)
        raise
    # Not the ordinary way out: gloo's threads sometimes abort a process that is being torn down, its work done.
    logging.shutdown()
    os._exit(0)
