"""Takes the place of the agent and of its ranks: one process that does job after job, until it is ended."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

from fake_agent import write_result

SECONDS_PER_JOB = 0.1


def main() -> None:
    group, pid = Path(sys.argv[2]), os.getpid()
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    for number in itertools.count(1):
        request = group / f"request-{number:06}.json"
        while not request.exists():
            time.sleep(0.01)
        folder = Path(json.loads(request.read_text())["folder"])
        parallel = json.loads((folder / "job.json").read_text())["parallel"]
        time.sleep(SECONDS_PER_JOB)
        write_result(folder)
        for rank in range(parallel["gpu_count"]):
            alive = {"pid": pid, "started": started, "phase": "done", "step": 0}
            (folder / f"rank{rank}.alive").write_text(json.dumps(alive))
        if not (parallel["more_follow"] or parallel["keep_warm_seconds"]):
            return


if __name__ == "__main__":
    main()
