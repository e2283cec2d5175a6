"""One job of real size through `distributed run`, on random weights: load time, s per step, peak memory.

    python benchmarks/real_size.py --folder /scratch/wan --gpus 2 1 --fsdp

Writes both experts (bf16, official layout) and a VAE once into --folder, then runs the job for each number of GPUs and
appends one JSON line each to benchmarks/results.jsonl. On a machine without a GPU, with
`--model tiny`, the same path runs on CPU processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pack import ROOT, append_results, mount_pack
from random_models import write_model


def write_job(folder: Path, arguments: argparse.Namespace, gpus: int) -> Path:
    """A job folder for `distributed run`."""
    import torch
    from safetensors.torch import save_file
    from wan_pack.distributed.job.job import FileIdentity, Job, ModelFiles, Parallel, Sampling
    from wan_pack.distributed.job.job_folder import JobDir
    from wan_pack.distributed.launch.launcher import new_job_id
    from wan_pack.distributed.machine.gpus import choose_gpus
    from wan_pack.distributed.planning.preflight import check_job
    from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files

    count, ids = choose_gpus(gpus)
    experts = [
        tuple(FileIdentity.of(file.absolute()) for file in checkpoint_files(folder / f"{side}_noise_model"))
        for side in ("high", "low")
    ]
    job = Job(
        id=new_job_id(),
        model=ModelFiles(
            high_noise=experts[0], low_noise=experts[1], vae=(FileIdentity.of((folder / "vae.safetensors").absolute()),)
        ),
        parallel=Parallel(
            gpu_count=count,
            gpu_ids=ids,
            use_fsdp=arguments.fsdp and count > 1,
            offload_model=arguments.offload,
            torch_compile=arguments.compile,
            memory_optimization=arguments.memory_optimization,
            ulysses_engine=arguments.engine,
            mixed_precision="bf16" if ids else "fp32",
        ),
        sampling=Sampling(
            width=arguments.width, height=arguments.height, num_frames=arguments.frames, steps=arguments.steps,
            seed=0, solver="euler", shift=5.0, guidance_low=1.0, guidance_high=1.0, fps=16.0,
        ),
    )  # fmt: skip
    text_dim = Checkpoint([part.path for part in experts[0]]).config.text_dim
    check_job(job, {"context": (64, text_dim)})
    path = folder / f"job-{gpus}"
    path.mkdir(exist_ok=True)
    save_file(
        {"context": torch.randn(64, text_dim, generator=torch.Generator().manual_seed(0))}, path / "inputs.safetensors"
    )
    JobDir(path).write_job(job)
    return path


def run(folder: Path, arguments: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """Runs the job and returns the line for the results."""
    path = write_job(folder, arguments, gpus)
    started = time.time()
    subprocess.run([sys.executable, str(ROOT / "distributed"), "run", str(path)], check=True)
    result = json.loads((path / "result.json").read_text())
    steps = result["step_seconds"]
    return {
        "benchmark": "real_size",
        "model": arguments.model,
        "gpus": gpus,
        "size": f"{arguments.width}x{arguments.height}x{arguments.frames}",
        "total_seconds": round(time.time() - started, 2),
        "load_seconds": round(result["phases"]["load"], 2),
        "first_step_seconds": round(steps[0], 3),
        "seconds_per_step": round(min(steps[1:] or steps), 3),
        "decode_seconds": round(result["phases"]["decode"] + result["phases"]["write"], 2),
        "peak_gpu_gib": [round(n / 2**30, 2) for n in result["peak_gpu_bytes"]],
        "peak_host_gib": [round(n / 2**30, 2) for n in result["peak_rss_bytes"]],
        "settings": result["settings"],
        "python": platform.python_version(),
        "command": " ".join(["python", "benchmarks/real_size.py", *sys.argv[1:]]),
    }


def latents_difference(folder: Path, first: int, second: int) -> float:
    """Relative difference of what two runs denoised: rounding, where the same job ran on another number of GPUs."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / f"job-{gpus}" / "latents.safetensors")["samples"] for gpus in (first, second))
    return ((a - b).norm() / a.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--model", default="t2v-A14B", help="a name in wan/model/config.py, or tiny")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--engine", default="packed", choices=["packed", "deepspeed"])
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory-optimization", action="store_true")
    arguments = parser.parse_args()
    mount_pack()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model = write_model(arguments.folder, arguments.model)
    for index, gpus in enumerate(arguments.gpus):
        line = run(model, arguments, gpus)
        if index:
            line["latents_difference"] = latents_difference(model, arguments.gpus[0], gpus)
        append_results(line)
        print(
            f"{line['gpus']} GPUs: load {line['load_seconds']} s, step {line['seconds_per_step']} s, "
            f"GPU {line['peak_gpu_gib']} GiB, host {line['peak_host_gib']} GiB"
            + (f", latents differ by {line['latents_difference']:.1e} from the first run's" if index else "")
        )


if __name__ == "__main__":
    main()
