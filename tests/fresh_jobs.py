"""Runs job folders one after another, each on ranks that are forked for it and know nothing of the one before.

    python tests/fresh_jobs.py JOB_FOLDER ...

What a fresh start would make, without the seconds of a real one: torch is imported once, and there is no agent. Not
imported by tests.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile

from forks import fork_ranks
from mount import mount_pack


def main() -> int:
    mount_pack()
    from wan_pack.distributed.groupdir import GroupDir
    from wan_pack.distributed.jobdir import JobDir
    from wan_pack.distributed.rank_files import RankFiles
    from wan_pack.distributed.worker import main as run_worker

    def rank_of(folder: JobDir, group: GroupDir, world: int, rank: int) -> int:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in names.items()})
        run_worker(group, folder, RankFiles(folder, rank), None).leave()
        return 0

    for path in sys.argv[1:]:
        world = JobDir(path).read_job().parallel.gpu_count
        with tempfile.TemporaryDirectory() as temp:
            if any(fork_ranks(functools.partial(rank_of, JobDir(path), GroupDir(temp), world), world)):
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
