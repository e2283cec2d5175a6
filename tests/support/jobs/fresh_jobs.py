"""Jobs on ranks that are forked for them and know nothing of the one before.

What a fresh start makes, without the seconds of a real one: torch is imported once, and there is no agent.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import fork_ranks
from jobs import write_embeddings
from wan_pack.distributed.job.job import Job
from wan_pack.distributed.job.job_folder import JobDir


def run_fresh(job: Job, parent: Path, write_inputs: Callable[[Path], Any] = write_embeddings) -> JobDir:
    """Runs a job in a folder under `parent`. AssertionError with what the ranks logged if one of them failed."""
    folder, world = JobDir.create(parent), job.parallel.gpu_count
    folder.write_job(job)
    write_inputs(folder.inputs)
    with tempfile.TemporaryDirectory() as group:
        codes = fork_ranks(functools.partial(_run, folder.path, Path(group), world), world, log=folder.agent_log)
    logs = [folder.agent_log, *(folder.log(rank) for rank in range(world))]
    assert not any(codes), "\n".join(log.read_text(errors="replace") for log in logs if log.exists())
    return folder


def _run(path: Path, group: Path, world: int, rank: int) -> None:
    from wan_pack.distributed.group.group_folder import GroupDir
    from wan_pack.distributed.machine.memory_file import STORE_VARIABLE
    from wan_pack.distributed.rank.shell import redirect_to, set_up_logging
    from wan_pack.distributed.rank.signs import RankFiles
    from wan_pack.distributed.rank.worker import main

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, STORE_VARIABLE: group / "store"}
    os.environ.update({name: str(value) for name, value in names.items()})
    folder = JobDir(path)
    files = RankFiles(folder, rank)
    redirect_to(folder.log(rank))
    set_up_logging(rank, lambda: files.phase, verbose=False)
    main(GroupDir(group), folder, files, None).leave()
