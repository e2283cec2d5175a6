"""Jobs under memory caps: what the planner chooses, whether it fits, and how far its estimate is from what was used.

    python benchmarks/memory.py --folder /scratch/wan --cases t2v-A14B:480p i2v-A14B:480p ti2v-5B:720p

This process takes so much of each GPU that only the cap is left free. The planner sees that in nvidia-smi, as it would
see a smaller card's; the job runs through the product's own launcher, and runs out of memory where such a card would.
Cases run side by side, each on GPUs of its own: their memory is exact, their times are a large card's. Prints a table
and appends one JSON line for each job to benchmarks/results.jsonl. On a machine without a GPU, with `--cases
tiny:128x96x9`, the same path runs on CPU processes, whose memory nobody caps.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import threading
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pack import RESULTS, append_results, mount_pack
from random_models import write_model
from real_jobs import Shape, difference, make_inputs, make_job, moved
from side_by_side import run_side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from wan_pack.distributed.job.job import Job
    from wan_pack.distributed.machine.gpus import Gpu
    from wan_pack.distributed.planning.plan import Plan

GIB = 2**30
COLUMNS = (
    "model", "size", "cap", "gpus", "plan", "seconds_per_step", "estimated_gib", "peak_gpu_gib", "error_percent",
    "estimated_total_gib", "used_gib", "total_error_percent", "difference",
)  # fmt: skip
POLL = 0.02


class Case(NamedTuple):
    shape: Shape
    cap: float
    """GiB."""
    gpus: int


class Cap:
    """Leaves no more than `cap_gib` of each GPU free, and watches how much of that is used. A context manager.

    Attributes:
        used: bytes of the GPU that is fullest, at most so far.
    """

    def __init__(self, ids: list[str], cap_gib: float) -> None:
        self._devices, self._cap = [int(index) for index in ids], int(cap_gib * GIB)
        self._taken: list[Tensor] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.used = 0

    def __enter__(self) -> Cap:
        import torch

        for device in self._devices:
            too_much = torch.cuda.mem_get_info(device)[0] - self._cap
            if too_much > 0:
                self._taken.append(torch.empty(too_much, dtype=torch.uint8, device=f"cuda:{device}"))
        self._free = [torch.cuda.mem_get_info(device)[0] for device in self._devices]
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._taken:
            import torch

            self._taken.clear()
            torch.cuda.empty_cache()

    def _watch(self) -> None:
        import torch

        while not self._stop.wait(POLL):
            for device, free in zip(self._devices, self._free, strict=True):
                self.used = max(self.used, free - torch.cuda.mem_get_info(device)[0])


def gpus_of(ids: list[str], case: Case) -> list[Gpu]:
    """As nvidia-smi has them now; made-up ones of the cap's size on a machine without a GPU."""
    from wan_pack.distributed.machine.gpus import Gpu, list_gpus

    cap = int(case.cap * GIB)
    made_up = [Gpu(index=str(i), uuid=str(i), name="CPU", total_bytes=cap, free_bytes=cap) for i in range(case.gpus)]
    return [gpu for gpu in list_gpus() if gpu.index in ids] or made_up


def plan_of(job: Job, gpus: list[Gpu], host_gib: float | None) -> Plan:
    """As a node would have it laid out. Raises ValueError if it does not fit."""
    from wan_pack.distributed.machine.host_memory import available_bytes
    from wan_pack.distributed.machine.topology import read_topology
    from wan_pack.distributed.planning.plan import make_plan
    from wan_pack.distributed.planning.policies import Request
    from wan_pack.distributed.planning.workload import workload_of

    base = dataclasses.replace(job.parallel, gpu_count=1, gpu_ids=(), use_fsdp=True)
    work = workload_of(job.model, job.sampling, base, encodes_text=False)
    work = dataclasses.replace(work, controls=int(work.config.variant.controlled))
    host = available_bytes() if host_gib is None else int(host_gib * GIB)
    return make_plan(work, Request(base=base, gpu_count=len(gpus)), gpus, read_topology(), host_bytes=host)


class Measurement:
    """Of all cases; the first result of a shape is what the others are compared with."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.lines: list[dict[str, Any]] = []
        self._first: dict[Shape, Tensor] = {}
        self._lock = threading.Lock()

    def run(self, case: Case, ids: list[str]) -> None:
        shape = case.shape
        line: dict[str, Any] = {
            "benchmark": "memory", "model": shape.model, "cap": case.cap, "gpus": case.gpus,
            "size": "x".join(map(str, shape.pixels)), "pictures": shape.pictures, "steps": shape.steps,
            "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        }  # fmt: skip
        with Cap(ids, case.cap) as cap:
            try:
                self._measure(case, ids, cap, line)
            # A refusal, or a failed job: the other cases go on.
            except Exception as error:
                planned = "plan" in line
                words = str(error) if planned else f"refused: {error}"
                line |= {"error" if planned else "plan": words.splitlines()[0], "used_gib": round(cap.used / GIB, 2)}
        with self._lock:
            self.lines.append(line)
            append_results(line, self.arguments.results)
        print(table([line]).splitlines()[-1], flush=True)

    def _measure(self, case: Case, ids: list[str], cap: Cap, line: dict[str, Any]) -> None:
        from safetensors.torch import save_file
        from wan_pack.distributed.launch.launcher import run_job

        shape, folder = case.shape, self.arguments.folder
        job = make_job(folder, shape, (), case.gpus, mixed_precision="bf16" if ids else "fp32")
        gpus = gpus_of(ids, case)
        line["free_gib"] = round(min(gpu.free_bytes for gpu in gpus) / GIB, 2)
        plan = plan_of(job, gpus, self.arguments.host_gib)
        assert plan.estimate is not None
        line |= {
            "plan": plan.block().splitlines()[0].removeprefix("plan: ").partition("; ")[2],
            "estimate": {name: round(size / GIB, 2) for name, size in dataclasses.asdict(plan.estimate).items()},
            "estimated_gib": round((plan.estimate.total - plan.estimate.process) / GIB, 2),
            "estimated_total_gib": round(plan.estimate.total / GIB, 2),
        }
        parallel = plan.parallel if ids else dataclasses.replace(plan.parallel, gpu_ids=())
        parent = folder / "jobs" / f"memory-{'-'.join(ids)}"
        result = run_job(
            dataclasses.replace(job, parallel=parallel), lambda path: save_file(make_inputs(shape), path),
            parent=parent, failed=folder / "failed",
        )  # fmt: skip
        info = result.info
        steps, peak = info["step_seconds"], max(info["peak_gpu_bytes"]) / GIB
        latents = moved(result.folder.latents, shape)
        result.remove()
        with self._lock:
            first = self._first.setdefault(shape, latents)
        line |= {
            "seconds_per_step": round(min(steps), 3), "peak_gpu_gib": round(peak, 2),
            "used_gib": round(cap.used / GIB, 2),
            "peak_host_gib": [round(n / GIB, 2) for n in info["peak_rss_bytes"]],
            "phases": {name: round(seconds, 2) for name, seconds in info["phases"].items()},
            "difference": difference(first, latents), "settings": info["settings"],
        }  # fmt: skip
        if peak:
            line["error_percent"] = round((line["estimated_gib"] / peak - 1) * 100, 1)
        if cap.used:
            line["total_error_percent"] = round((line["estimated_total_gib"] * GIB / cap.used - 1) * 100, 1)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one row for each line; a job that failed has its error as its plan."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for line in lines:
        failed = f"; failed: {line['error']}" if "error" in line else ""
        shown = {**line, "plan": line["plan"] + failed}
        rows.append(tuple(str(shown.get(name, "")) for name in COLUMNS))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--cases", nargs="+", default=["t2v-A14B:480p"], metavar="MODEL:SIZE", help="see real_jobs.py")
    parser.add_argument("--caps", type=float, nargs="+", default=[16, 24, 48, 80], help="GiB")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=2, help="with two, both experts run")
    parser.add_argument("--host-gib", type=float, help="host memory to plan with, where the system tells less")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    mount_pack()
    # nvidia-smi's order, in which devices are counted here too.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    kinds = [case.split(":") for case in arguments.cases]
    for model, _ in kinds:
        write_model(arguments.folder, model)
    measurement = Measurement(arguments)
    cases = [
        Case(Shape(model, size, arguments.steps, "start" if "i2v" in model.split("-") else "none"), cap, gpus)
        for gpus, (model, size), cap in product(arguments.gpus, kinds, arguments.caps)
    ]
    run_side_by_side(cases, lambda case: case.gpus, measurement.run)
    print(table(measurement.lines))


if __name__ == "__main__":
    main()
