"""Makes small wrong changes of the code, one at a time, and says which of them no test notices.

    python tests/mutation [--seed 1] [--count 200] [FILE_OR_FOLDER ...]

A change is run by the tests that run its line and start no process but ffmpeg; each in a fork of one process that has
imported torch. Nothing in the sources is touched. A survivor is a missing test, or changes nothing that anybody could
see.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
SUPPORT = Path(__file__).resolve().parent.parent / "support"
sys.path[:0] = [str(Path(__file__).resolve().parent), str(SUPPORT)]

import cover  # noqa: E402
import trial  # noqa: E402
from changes import Change, changed, changes  # noqa: E402
from mount import ROOT  # noqa: E402

ROOMS = (
    "wan", "distributed/job", "distributed/planning", "distributed/machine", "distributed/weights", "distributed/rank",
    "distributed/group/environment.py", "distributed/group/evaluation_memory.py",
    "distributed/group/evaluation_request.py", "distributed/group/leftovers.py", "distributed/group/failures.py",
    "distributed/group/installation.py", "distributed/parallel/memory_layout.py", "distributed/parallel/page_locks.py",
    "distributed/parallel/parallelize.py", "distributed/parallel/passes.py", "distributed/parallel/sequence.py",
    "distributed/parallel/shared_reading.py", "distributed/parallel/split_vae.py",
    "distributed/parallel/symmetric.py", "distributed/hosts/hostfile.py", "distributed/hosts/host_agent.py",
    "distributed/hosts/host_check.py", "distributed/launch/changed_file.py", "distributed/launch/group_evaluator.py",
    "distributed/launch/group_kind.py", "distributed/launch/held.py", "distributed/launch/pool.py",
    "distributed/launch/result.py",
    "distributed/launch/served_job.py", "distributed/launch/vae_calls.py", "nodes/batch", "nodes/core",
    "nodes/inference", "nodes/models", "nodes/settings", "nodes/sockets", "nodes/host/core_model.py",
    "nodes/host/core_vae.py", "nodes/host/request_body.py", "nodes/host/other_pages.py", "nodes/host/own_folder.py",
)  # fmt: skip
"""What decides results, safety and memory, and is run by tests that start no process."""
ELSEWHERE = frozenset(
    {
        # On a GPU.
        *(f"wan/model/kernels/{name}.py" for name in ("fused", "head_codes", "heads", "norm", "rows")),
        "wan/vae/vae_kernels.py",
        # In processes that tests start.
        "distributed/rank/shell.py",
    }
)
"""Files of those rooms that no such test runs."""


def sample(places: list[str], count: int, seed: int) -> list[tuple[str, Change]]:
    """`count` changes of the files: a kind of change by lot, then one of that kind, so that rare kinds come too."""
    kinds: dict[str, list[tuple[str, Change]]] = {}
    for file in _files(places):
        for change in changes((ROOT / file).read_text()):
            kinds.setdefault(change.kind, []).append((file, change))
    chance = random.Random(seed)
    for kind in sorted(kinds):
        chance.shuffle(kinds[kind])
    chosen: list[tuple[str, Change]] = []
    while kinds and len(chosen) < count:
        kind = chance.choice(sorted(kinds))
        chosen.append(kinds[kind].pop())
        if not kinds[kind]:
            del kinds[kind]
    return sorted(chosen, key=lambda entry: (entry[0], entry[1].line, entry[1].node, entry[1].way))


def _files(places: list[str]) -> Iterator[str]:
    for place in places:
        path = ROOT / place
        if not path.exists():
            raise SystemExit(f"{place} is not there")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            if file.stem != "__init__" and name not in ELSEWHERE:
                yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "places", nargs="*", default=ROOMS, metavar="FILE_OR_FOLDER", help="default: " + ", ".join(ROOMS)
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    chosen = sample(list(arguments.places), arguments.count, arguments.seed)
    lines = cover.load()
    if lines is None:
        print("recording which test runs which line ...", flush=True)
        path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, cover.__file__, "-m", trial.QUICK]
        # Tests that fail without any change are left out.
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
        lines = cover.load()
        if lines is None:
            raise SystemExit("the tests could not be recorded, or the sources changed meanwhile")
    os.chdir(ROOT)
    trial.prepare()
    trial.check(list(lines.seconds), sum(lines.seconds.values()))
    caught, survivors = 0, []
    for file, change in chosen:
        source, started = (ROOT / file).read_text(), time.monotonic()
        tests = lines.tests(file, change.line, source)
        lives = all(
            trial.survives(ROOT / file, changed(source, change), part, sum(lines.seconds[test] for test in part))
            for part in cover.near_and_far(file, tests)
        )
        caught += not lives
        if lives:
            survivors.append((file, change))
        word = "SURVIVES" if lives else "caught"
        print(f"{word:8} {time.monotonic() - started:5.1f} s, {len(tests):4} tests  {file}:{change}", flush=True)
    print(f"\ncaught {caught} of {len(chosen)} (seed {arguments.seed}); {len(survivors)} survive:")
    for file, change in survivors:
        print(f"  {file}:{change}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
