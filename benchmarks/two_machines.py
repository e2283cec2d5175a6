"""Jobs over two machines, beside the same ones on one: bits and seconds; and how a job ends whose link is cut.

    python benchmarks/two_machines.py --folder /scratch/wan

Needs root and two GPUs of one computer, or no GPU and `--model tiny --size 128x96x9`. The machines are those of the
tests (tests/support/jobs/machines.py): namespaces of their own, a veth between them, the pack's own hostfile.
Each also has a name, locks, /dev with one GPU and /dev/shm of its own: NCCL has nothing but sockets. The file system is
shared. Prints a line for each job, and appends it to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pack import RESULTS, ROOT, append_results, mount_pack
from random_models import write_model
from real_jobs import Shape, difference, make_inputs, make_job, moved

sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "support" / "jobs")]
from machines import Machines  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ("NCCL_", "TORCH_", "CUDA_", "NVIDIA_", "LD_LIBRARY_PATH")
"""Of this environment, by prefix: a session that ssh opens has none of it."""
OWN = """set -e
mkdir -p /tmp/wan-distributed-gpus
mount -t tmpfs -o mode=1777 tmpfs /tmp/wan-distributed-gpus
"""
ONE_GPU = """devices=$(mktemp -d)
mount -t tmpfs -o mode=755 tmpfs $devices
cd /dev
for name in *; do
  case $name in nvidia[0-9]*) [ $name = nvidia{number} ] || continue ;; esac
  if [ -c $name ] || [ -L $name ]; then cp -a $name $devices/; elif [ -d $name ]; then mkdir $devices/$name; fi
done
[ ! -d nvidia-caps ] || cp -a nvidia-caps/. $devices/nvidia-caps/
mount --rbind pts $devices/pts
# Else CUDA makes the other GPU's device itself.
mount -o remount,ro $devices
cd /
mount --rbind $devices /dev
mount -t tmpfs tmpfs /dev/shm
"""
OPTIONAL: dict[str, dict[str, Any]] = {
    "DeepSpeed's exchange": {"ulysses_engine": "deepspeed"},
    "flash-attn": {"ulysses_engine": "packed", "attention": "flash-attn"},
}
"""Of packages that may be missing."""
STALL_TIMEOUT = 15.0
"""Seconds, of the job whose link is cut."""


class GpuMachines(Machines):
    """Each with one GPU, which its programs number 0."""

    def __init__(self, tools: Path, gpus: int) -> None:
        super().__init__(tools)
        for number in range(len(self.hosts)):
            script = (OWN + (ONE_GPU if gpus else "")).format(number=number)
            subprocess.run([*self.inside(number), "sh", "-c", script], check=True)

    def inside(self, number: int) -> list[str]:
        # NCCL takes ranks of one host name for neighbours.
        names = ["unshare", "-u", "sh", "-c", f'hostname node{number}; exec "$@"', "sh"]
        kept = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(KEPT)]
        return [*super().inside(number), *names, "env", *kept]


class Measurement:
    """Of all jobs, each compared with the first of its guidance."""

    def __init__(self, arguments: argparse.Namespace, gpus: int) -> None:
        self.arguments, self.gpus = arguments, gpus
        self._seen: dict[bool, Tensor] = {}

    def run(self, name: str, *, guided: bool, on_progress: Any = None, steps: int = 4, **settings: Any) -> None:
        """Args: settings: of Parallel."""
        from safetensors.torch import save_file
        from wan_pack.distributed.launch.launcher import run_job

        folder = self.arguments.folder
        shape = Shape(self.arguments.model, self.arguments.size, steps, guided=guided)
        ids = tuple(map(str, range(1 if "hosts" in settings else 2))) if self.gpus else ()
        job = make_job(folder, shape, ids, 2, **settings)
        start = time.monotonic()
        result = run_job(
            job, lambda path: save_file(make_inputs(shape), path), parent=folder / "jobs", failed=folder / "failed",
            **({} if on_progress is None else {"on_progress": on_progress}),
        )  # fmt: skip
        total, info, latents = time.monotonic() - start, result.info, moved(result.folder.latents, shape)
        result.remove()
        self.say(
            name=name, guided=guided, total=round(total, 2), step_seconds=[round(s, 4) for s in info["step_seconds"]],
            difference=difference(self._seen.setdefault(guided, latents), latents), settings=info["settings"],
        )  # fmt: skip

    def say(self, **values: Any) -> None:
        line = {
            "benchmark": "two_machines", "model": self.arguments.model, "size": self.arguments.size, **values,
            "command": " ".join(["python", "benchmarks/two_machines.py", *sys.argv[1:]]),
        }  # fmt: skip
        print(line, flush=True)
        append_results(line, self.arguments.results)

    def cut(self, machines: Machines) -> None:
        """The link goes while a step exchanges: what is said, and how long after."""
        from wan_pack.distributed.launch.launcher import JobFailed

        at: list[float] = []
        timers: list[threading.Timer] = []

        def cut() -> None:
            at.append(time.monotonic())
            machines.cut()

        def on_progress(progress: Any) -> None:
            if progress.phase == "denoise" and progress.step >= 2 and not timers:
                # Not where the step ends.
                timers.append(threading.Timer(self.arguments.cut_after, cut))
                timers[0].start()

        try:
            self.run("cut", guided=False, steps=1000, hosts=machines.hosts, stall_timeout=STALL_TIMEOUT,
                     on_progress=on_progress)  # fmt: skip
        except JobFailed as error:
            seconds = time.monotonic() - at[0]
            empty = machines.empty_within(60)
            self.say(name="cut", seconds=round(seconds, 2), stall_timeout=STALL_TIMEOUT, empty_after=round(empty, 2),
                     said=str(error).splitlines()[0])  # fmt: skip
        finally:
            machines.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--model", default="t2v-1.3B", help="one that takes no pictures, or tiny")
    parser.add_argument("--size", default="832x480x81", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--cut-after", type=float, default=0.35, help="seconds into a step")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    mount_pack()
    from wan_pack.distributed.machine.gpus import list_gpus

    gpus = len(list_gpus())
    if gpus == 1:
        parser.error("there is one GPU; two machines need two, or none")
    write_model(arguments.folder, arguments.model)
    measurement = Measurement(arguments, gpus)
    measurement.run("one machine, packed", guided=False, ulysses_engine="packed")
    measurement.run("one machine, CFG parallel", guided=True, cfg_parallel=True)
    for name, settings in OPTIONAL.items():
        try:
            measurement.run(f"one machine, {name}", guided=False, **settings)
        except ValueError as error:
            print(f"{name} is left out: {error}", flush=True)
    with tempfile.TemporaryDirectory() as temp:
        machines = GpuMachines(Path(temp, "tools"), gpus)
        os.environ["PATH"] = f"{machines.tools}:{os.environ['PATH']}"
        try:
            measurement.run("two machines, CFG parallel", guided=True, cfg_parallel=True, hosts=machines.hosts)
            measurement.run("two machines, packed", guided=False, hosts=machines.hosts)
            measurement.cut(machines)
        finally:
            machines.close()


if __name__ == "__main__":
    main()
