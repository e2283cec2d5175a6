"""Jobs under memory caps: what the planner chooses, whether it fits, and how far its estimate is from what was used.

    python benchmarks/memory.py --folder /scratch/wan --caps 16 24 48 80 --gpus 1 2

Each job is laid out by the real planner for GPUs of that many GiB, and runs in processes that torch holds to it
(`set_per_process_memory_fraction`, less what the estimate allows for the context and NCCL). Writes the random weights
of real_size.py once, prints a table and appends one JSON line for each job to benchmarks/results.jsonl. On a machine
without a GPU, with `--model tiny`, the same path runs on CPU processes, whose memory nobody caps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from real_size import append_results, mount_pack, write_job, write_model

if TYPE_CHECKING:
    from wan_pack.distributed.gpus import Gpu
    from wan_pack.distributed.planning.plan import Plan

GIB = 2**30
COLUMNS = ("cap", "gpus", "plan", "seconds_per_step", "estimated_gib", "peak_gpu_gib", "error_percent")
TIMEOUT = 1800
"""Seconds for the processes of one job."""
GRACE = 10


def capped_gpus(count: int, cap_gib: float) -> list[Gpu]:
    """The machine's GPUs as if they had no more than the cap; made-up ones on a machine without a GPU."""
    from wan_pack.distributed.gpus import Gpu, list_gpus

    cap = int(cap_gib * GIB)
    found = list_gpus()[:count] or [
        Gpu(index=str(i), uuid=str(i), name="CPU", total_bytes=cap, free_bytes=cap) for i in range(count)
    ]
    return [
        dataclasses.replace(gpu, total_bytes=min(gpu.total_bytes, cap), free_bytes=min(gpu.free_bytes, cap))
        for gpu in found
    ]


def planned_job(path: Path, gpus: list[Gpu]) -> Plan:
    """Lays out the job in `path` for these GPUs, and writes it back. Raises ValueError if it does not fit."""
    from wan_pack.distributed.host_memory import available_bytes
    from wan_pack.distributed.jobdir import JobDir
    from wan_pack.distributed.planning.plan import make_plan
    from wan_pack.distributed.planning.policies import Request
    from wan_pack.distributed.planning.topology import read_topology
    from wan_pack.distributed.planning.workload import workload_of

    folder = JobDir(path)
    job = folder.read_job()
    base = dataclasses.replace(job.parallel, gpu_count=1, gpu_ids=(), use_fsdp=True)
    work = workload_of(job.model, job.sampling, base, encodes_text=False)
    request = Request(base=base, gpu_count=len(gpus))
    plan = make_plan(work, request, gpus, read_topology(), host_bytes=available_bytes())
    ids = plan.parallel.gpu_ids if job.parallel.gpu_ids else ()
    folder.write_job(dataclasses.replace(job, parallel=dataclasses.replace(plan.parallel, gpu_ids=ids)))
    return plan


def run_rank(path: Path, group: Path, cap_bytes: int) -> None:
    """One rank of the job in `path`, in this process."""
    import torch
    from wan_pack.distributed.groupdir import GroupDir
    from wan_pack.distributed.jobdir import JobDir
    from wan_pack.distributed.rank_files import RankFiles
    from wan_pack.distributed.worker import main as run_worker

    if torch.cuda.is_available():
        device = int(os.environ["LOCAL_RANK"])
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap_bytes / total, 1.0), device)
    folder = JobDir(path)
    run_worker(GroupDir(group), folder, RankFiles(folder, int(os.environ["RANK"])), None).leave()


def run_job(path: Path, plan: Plan, cap_gib: float) -> dict[str, Any]:
    """Runs the ranks to their end. Returns result.json. Raises RuntimeError with a failed rank's last words."""
    from wan_pack.distributed.groupdir import GroupDir
    from wan_pack.distributed.planning.memory import process_bytes

    world = plan.parallel.gpu_count
    for name in ("result.json", "latents.safetensors"):
        (path / name).unlink(missing_ok=True)
    (path / "logs").mkdir(exist_ok=True)
    cap = int(cap_gib * GIB) - process_bytes(plan.parallel)
    with tempfile.TemporaryDirectory() as temp:
        group = GroupDir.create(Path(temp), world)
        command = [sys.executable, __file__, "--rank", str(path), str(group.path), str(cap)]
        ranks = []
        for rank in range(world):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(plan.parallel.gpu_ids)
            log = (path / "logs" / f"memory{rank}.log").open("w+")
            ranks.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log))
        try:
            codes = wait_for([process for process, _ in ranks])
        finally:
            for process, _ in ranks:
                process.kill()
        # Those that were killed for another's failure, whose code is negative, come last.
        for code, (_, log) in sorted(zip(codes, ranks, strict=True), key=lambda pair: -pair[0]):
            log.seek(0)
            if code:
                raise RuntimeError("\n".join(log.read().splitlines()[-5:]))
            log.close()
    result: dict[str, Any] = json.loads((path / "result.json").read_text())
    return result


def wait_for(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes. When one has failed, the others, which may wait for it, have `GRACE` seconds left."""
    until = time.monotonic() + TIMEOUT
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            until = min(until, time.monotonic() + GRACE)
        if time.monotonic() > until:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    return [rank.wait() for rank in ranks]


def measure(folder: Path, arguments: argparse.Namespace, cap_gib: float, gpus: int) -> dict[str, Any]:
    """Plans and runs one job. Returns its line for the results."""
    line: dict[str, Any] = {
        "benchmark": "memory", "model": arguments.model, "cap": cap_gib, "gpus": gpus,
        "size": f"{arguments.width}x{arguments.height}x{arguments.frames}",
    }  # fmt: skip
    path = write_job(folder, arguments, gpus)
    try:
        plan = planned_job(path, capped_gpus(gpus, cap_gib))
    except ValueError as error:
        return line | {"plan": f"refused: {error}"}
    assert plan.estimate is not None
    line |= {"plan": plan.block().splitlines()[0].removeprefix("plan: ")}
    line |= {"estimated_gib": round(plan.estimate.torch_peak / GIB, 2)}
    try:
        result = run_job(path, plan, cap_gib)
    except RuntimeError as error:
        return line | {"error": str(error)}
    steps, peak = result["step_seconds"], max(result["peak_gpu_bytes"]) / GIB
    line |= {"seconds_per_step": round(min(steps[1:] or steps), 3), "peak_gpu_gib": round(peak, 2)}
    if peak:
        line["error_percent"] = round((line["estimated_gib"] / peak - 1) * 100, 1)
    return line | {"settings": result["settings"]}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one row for each line; a job that failed has its error as its plan."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for line in lines:
        failed = f"; failed: {line['error'].splitlines()[-1]}" if "error" in line else ""
        shown = {**line, "plan": line["plan"] + failed}
        rows.append(tuple(str(shown.get(name, "")) for name in COLUMNS))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        mount_pack()
        run_rank(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--model", default="t2v-A14B", help="a name in wan/config.py, or tiny")
    parser.add_argument("--caps", type=float, nargs="+", default=[16, 24, 48, 80], help="GiB")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=4)
    # What write_job asks for; the planner sets the rest.
    parser.set_defaults(fsdp=False, offload=False, compile=False, memory_optimization=False, engine="packed")
    arguments = parser.parse_args()
    mount_pack()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_model(arguments.folder, arguments.model)
    lines = []
    for gpus in arguments.gpus:
        for cap in arguments.caps:
            lines.append(measure(arguments.folder, arguments, cap, gpus))
            append_results(lines[-1])
            print(table(lines[-1:]).splitlines()[-1], flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
