"""How jobs of real size end and start again: seconds to the error, to free GPU memory, and to the next first step.

    python benchmarks/endings.py --folder /scratch/wan

Writes the random model of real_size.py if it is not there. Without a GPU, with `--model tiny`, the same runs on CPU
processes, where only processes are watched.

    python benchmarks/endings.py --server 5

measures cancels in every phase that lasts, and kills, in a real ComfyUI on tiny models, each five times on the idle
machine and beside four busy processes per core, and writes the table into README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import busy_endings
from pack import RESULTS, ROOT, append_results, mount_pack
from random_models import write_model
from real_size import write_job
from table import replace_marked

README = Path(__file__).resolve().parent / "README.md"
MARKS = ("<!-- endings: made by endings.py -->", "<!-- endings: end -->")
FREE_BYTES = 2 << 30
"""Memory in use on a GPU under which it counts as free: contexts of other programs stay."""


def gpu_bytes() -> int:
    """Of all GPUs, in use; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(int(line) << 20 for line in subprocess.run(query, capture_output=True, text=True).stdout.split())


def job_processes() -> list[int]:
    """Agents and ranks of any job on this machine."""
    from wan_pack.distributed.machine.processes import GROUP_VARIABLE

    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if GROUP_VARIABLE.encode() + b"=" in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def seconds_until(condition: Callable[[], bool], limit: float = 60.0) -> float | None:
    """None if it did not come true within `limit` seconds."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit:
            return None
        time.sleep(0.02)
    return round(time.monotonic() - start, 2)


def after_the_end() -> dict[str, float | None]:
    return {
        "processes_gone": seconds_until(lambda: not job_processes()),
        "memory_free": seconds_until(lambda: gpu_bytes() < FREE_BYTES),
    }


def foreign_listeners(pids: list[int]) -> list[str]:
    """Addresses outside of loopback on which the processes listen, as in /proc/net/tcp."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local = fields[1].rpartition(":")[0]
            loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
            if fields[3] == "0A" and fields[9] in inodes and local not in loopback:
                found.append(fields[1])
    return found


class Trial:
    """Runs jobs and does things to them when they have made `step` steps."""

    def __init__(self, source: Path, folder: Path, step: int) -> None:
        from wan_pack.distributed.job.job_folder import JobDir
        from wan_pack.distributed.launch.pool import Pool

        self.source, self.folder, self.step, self.pool = JobDir(source), folder, step, Pool()
        self.listeners: list[str] | None = None

    def run(self, act: Callable[[Path], None] | None = None, *, cancel: bool = False, **changes: Any) -> dict[str, Any]:
        """One job: how it ended, and when."""
        from wan_pack.distributed.job.job import Job, JobError
        from wan_pack.distributed.launch.launcher import new_job_id, run_job

        job = self.source.read_job()
        assert isinstance(job, Job)
        parallel = {k: v for k, v in changes.items() if k in type(job.parallel).__dataclass_fields__}
        sampling = {k: v for k, v in changes.items() if k not in parallel}
        job = dataclasses.replace(
            job, id=new_job_id(), parallel=dataclasses.replace(job.parallel, **parallel),
            sampling=dataclasses.replace(job.sampling, **sampling),
        )  # fmt: skip
        start = time.monotonic()
        seen: dict[str, float] = {}
        acted: list[float] = []

        def on_progress(progress: Any) -> None:
            now = time.monotonic()
            seen.setdefault(progress.phase, now - start)
            if progress.phase != "denoise":
                return
            if progress.step >= 1:
                seen.setdefault("first step", now - start)
            if progress.step >= self.step and not acted:
                acted.append(now)
                if self.listeners is None:
                    self.listeners = foreign_listeners(job_processes())
                if act is not None:
                    (path,) = (self.folder / "jobs").glob("wan-job-*")
                    act(path)
                acted[0] = time.monotonic()

        outcome: dict[str, Any] = {}
        try:
            result = run_job(
                job, lambda path: shutil.copyfile(self.source.inputs, path), parent=self.folder / "jobs",
                failed=self.folder / "failed", on_progress=on_progress, pool=self.pool,
                cancelled=lambda: cancel and bool(acted),
            )  # fmt: skip
            outcome |= {"load": round(result.info["phases"]["load"], 2), "peaks": result.info["peak_gpu_bytes"]}
            result.remove()
        except JobError as error:
            outcome["error"] = str(error).splitlines()[0]
        if "error" in outcome:
            outcome["seconds_to_error"] = round(time.monotonic() - acted[0], 2) if acted else None
            outcome |= after_the_end()
        outcome["total"] = round(time.monotonic() - start, 2)
        return outcome | {name.replace(" ", "_"): round(seconds, 2) for name, seconds in seen.items() if "st" in name}


def rank_pid(job: Path, rank: int) -> int:
    return int(json.loads((job / f"rank{rank}.alive").read_text())["pid"])


def parent_killed(source: Path, step: int) -> dict[str, Any]:
    """`distributed run` killed -9 in the middle of sampling, as ComfyUI may be."""
    parent = subprocess.Popen(
        [sys.executable, str(ROOT / "distributed"), "run", str(source)], stderr=subprocess.PIPE, text=True
    )
    assert parent.stderr is not None
    for line in parent.stderr:
        if "sampling" in line and "/" in line and int(line.split("/")[0].split()[-1]) >= step:
            break
    parent.kill()
    parent.wait()
    parent.stderr.close()
    return after_the_end()


def report(line: dict[str, Any]) -> None:
    append_results(line)
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the random weights and the jobs go")
    parser.add_argument("--server", type=int, metavar="N", help="in a real ComfyUI, idle and busy, N times each")
    parser.add_argument("--ways", default="", help="with --server: only those that this regular expression is found in")
    parser.add_argument("--model", default="t2v-A14B", help="a name in wan/model/config.py, or tiny")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if not arguments.server and arguments.folder is None:
        parser.error("--folder is missing, or --server N")
    mount_pack()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.server:
        busy_endings.measure(busy_endings.ways_like(arguments.ways), arguments.server, report)
        lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        README.write_text(replace_marked(README.read_text(), busy_endings.table(lines), *MARKS))
        return
    model = write_model(arguments.folder, arguments.model)
    options = argparse.Namespace(
        **vars(arguments) | {"gpus": [arguments.gpus]},
        fsdp=False, offload=False, compile=False, memory_optimization=False, engine="packed",
    )  # fmt: skip
    source = write_job(model, options, arguments.gpus)
    trial = Trial(source, arguments.folder, step=2)
    trials: dict[str, Callable[[], dict[str, Any]]] = {
        "cold": lambda: trial.run(keep_warm_seconds=600.0),
        "warm, another seed": lambda: trial.run(keep_warm_seconds=600.0, seed=1),
        "warm, another size": lambda: trial.run(keep_warm_seconds=600.0, height=arguments.height - 32),
        "released": lambda: {"groups": trial.pool.release(), **after_the_end()},
        "rank killed": lambda: trial.run(lambda job: os.kill(rank_pid(job, 1), signal.SIGKILL), steps=20),
        "rank frozen": lambda: trial.run(
            lambda job: os.kill(rank_pid(job, 1), signal.SIGSTOP), steps=20, stall_timeout=10.0
        ),
        "cancelled": lambda: trial.run(cancel=True, steps=20),
        "parent killed": lambda: parent_killed(source, 2),
    }
    for name, run in trials.items():
        line = {"benchmark": "endings", "trial": name, "model": arguments.model, "gpus": arguments.gpus, **run()}
        report(line)
    print(f"listening outside of loopback: {trial.listeners}")


if __name__ == "__main__":
    main()
