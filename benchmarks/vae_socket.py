"""A VAE behind ComfyUI's VAE socket beside the same VAE on ranks of its own: true sizes, random weights, in one call.

    python benchmarks/vae_socket.py --folder /scratch/wan --gpus 1 2 --sizes 480p 720p --models t2v-A14B ti2v-5B

First ranks that do nothing else (vae_alone.py) decode and encode the first size: seconds from the host's memory until
all lies there; with --exact diffusers' own VAE makes it in float32, too, which takes minutes. Then the way of Load VAE
(N GPUs): latents and frames in memory that the ranks map, a job for each call, a group that stays. A line has the
seconds that a caller waits, first and median of --repeats, and how much more that is than on ranks alone; the seconds
of the ranks; those of ComfyUI's arithmetic on the frames behind a decode; peak memory beside what the plan had
counted; how far the result is from that of the first number of GPUs and, with --exact, from diffusers' in float32.
Lines go to benchmarks/results.jsonl. The first precision has all GPUs and sizes, others the first of each. Without a
GPU, with `--models tiny --sizes 64x48x9 --precision fp32`, the same runs on CPU processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pack import RESULTS, append_results, mount_pack
from random_models import model_config, write_vae
from vae_alone import ALONE, WAYS, difference, exact_file, given_to, run_rank, write_given

if TYPE_CHECKING:
    from torch import Tensor
    from wan_pack.distributed.job.job import VaeJob
    from wan_pack.distributed.launch.pool import Pool

GIB = 2**30
KEEP_WARM = 600.0


class Calls:
    """On one number of GPUs, in one precision."""

    def __init__(self, arguments: argparse.Namespace, gpus: int, precision: str, pool: Pool) -> None:
        from wan_pack.distributed.launch.vae_calls import VaeCalls
        from wan_pack.distributed.machine.gpus import choose_gpus

        self.arguments, self.precision = arguments, precision
        self.gpus, self.gpu_ids = choose_gpus(gpus)
        folder = arguments.folder
        self.calls = VaeCalls(pool, lambda: None, parent=folder / "jobs", failed=folder / "failed")

    def job(self, way: str, model: str, given: Tensor) -> VaeJob:
        from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob
        from wan_pack.distributed.launch.launcher import new_job_id

        space, encode = model_config(model).variant.latents, way == "encode"
        frames, rows, columns = given.shape[2:]
        made = (3, 4 * frames - 3, rows * space.stride, columns * space.stride)
        if encode:
            made = space.shape(columns, rows, frames)
        return VaeJob(
            id=new_job_id(), vae=(FileIdentity.of(write_vae(self.arguments.folder, model).absolute()),), encode=encode,
            given=tuple(given.shape), made=(given.shape[0], *made),
            parallel=Parallel(
                gpu_count=self.gpus, gpu_ids=self.gpu_ids, mixed_precision=self.precision, keep_warm_seconds=KEEP_WARM
            ),
        )  # fmt: skip

    def line(self, given: Tensor, way: str, model: str, size: str) -> tuple[dict[str, Any], Tensor]:
        """And what is made."""
        from wan_pack.distributed.planning.vae_plan import held_bytes, needed_bytes, working_bytes

        seconds, ranks, arithmetic = [], [], []
        for _ in range(1 + self.arguments.repeats):
            job = self.job(way, model, given)
            start = time.perf_counter()
            with self.calls.together():
                made = self.calls.run(job, given)
            seconds.append(time.perf_counter() - start)
            assert self.calls.result is not None, "the call went well"
            info = self.calls.result.info
            ranks.append(info["phases"][way])
            if way == "decode":
                shown = made.clone()
                start = time.perf_counter()
                shown.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
                arithmetic.append(time.perf_counter() - start)
        return {
            "benchmark": "vae_socket", "model": model, "way": way, "size": size, "gpus": self.gpus,
            "precision": self.precision, "first": round(seconds[0], 3),
            "seconds": round(statistics.median(seconds[1:]), 4), "on_ranks": round(statistics.median(ranks[1:]), 4),
            "arithmetic": round(statistics.median(arithmetic), 4) if arithmetic else None,
            "peak_gib": round(max(info["peak_gpu_bytes"]) / GIB, 2),
            "estimated_gib": round((held_bytes(job) + working_bytes(job)) / GIB, 2),
            "of_the_gpu_gib": round(needed_bytes(job) / GIB, 2), "phases": info["phases"],
            "all_seconds": [round(s, 4) for s in seconds], "settings": info["settings"],
        }, made  # fmt: skip


def compared(line: dict[str, Any], made: Tensor, first: Tensor, folder: Path) -> dict[str, Any]:
    """What is known of the same on ranks alone, of the exact result, and of that on fewer GPUs."""
    from safetensors.torch import load_file

    told: dict[str, Any] = {"same_bits": bool((first == made).all()), "most_apart": float((first - made).abs().max())}
    asked = [line[name] for name in ("model", "way", "size", "gpus")]
    for *key, precision, alone, error in json.loads((folder / ALONE).read_text()):
        if key != asked:
            continue
        if precision == line["precision"]:
            told |= {"alone": round(alone, 4), "more_percent": round(100 * (line["seconds"] / alone - 1), 1)}
        if error is not None:
            exact = load_file(exact_file(folder, line["model"], line["way"]))["made"]
            ours = made[0].clamp(-1, 1) if line["way"] == "decode" else made[0]
            told |= {"error": difference(exact, ours), f"error_of_diffusers_{precision}": error}
    return told


def summary(line: dict[str, Any]) -> str:
    what = f"{line['gpus']} GPU {line['model']} {line['way']} {line['size']} {line['precision']}"
    more = f", alone {line['alone']} s: {line['more_percent']:+.1f} %" if "alone" in line else ""
    seconds = f"{line['seconds']} s (first {line['first']}, on the ranks {line['on_ranks']}{more})"
    behind = "" if line["arithmetic"] is None else f" + {line['arithmetic']} s of arithmetic"
    memory = f"peak {line['peak_gib']} GiB, estimated {line['estimated_gib']}"
    same = "same bits" if line["same_bits"] else f"{line['most_apart']:.1e} from fewer GPUs"
    error = "".join(f"; {name} {line[name]:.1e}" for name in line if name.startswith("error"))
    return f"{what}: {seconds}{behind}; {memory}; {same}{error}"


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    from wan_pack.distributed.launch.pool import Pool

    pool, first = Pool(), {}
    own, *others = arguments.precision
    runs = [(gpus, own) for gpus in arguments.gpus] + [(arguments.gpus[0], precision) for precision in others]
    for gpus, precision in runs:
        calls = Calls(arguments, gpus, precision, pool)
        try:
            for model in arguments.models:
                for size in arguments.sizes if precision == own else arguments.sizes[:1]:
                    for way in WAYS:
                        line, made = calls.line(given_to(folder, way, model, size), way, model, size)
                        line |= compared(line, made, first.setdefault((model, size, way, precision), made), folder)
                        line["command"] = " ".join(["python", "benchmarks/vae_socket.py", *sys.argv[1:]])
                        append_results(line, arguments.results)
                        print(summary(line), flush=True)
        except Exception:
            # What others measure is not lost with it.
            traceback.print_exc()
        finally:
            pool.release()


def main(texts: list[str] | None = None) -> None:
    import torch.multiprocessing as mp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--models", nargs="+", default=["t2v-A14B", "ti2v-5B"], help="whose VAEs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", nargs="+", default=["480p", "720p"], help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=("bf16", "fp32"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="compare with diffusers' in float32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(texts)
    mount_pack()
    for model in arguments.models:
        write_vae(arguments.folder, model)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as text:
        folder, world = Path(text), max(arguments.gpus)
        write_given(folder, arguments.models, arguments.sizes)
        context = mp.spawn(run_rank, (world, arguments, folder), nprocs=world, join=False)
        while not context.join():
            pass
        measure(arguments, folder)


if __name__ == "__main__":
    main()
