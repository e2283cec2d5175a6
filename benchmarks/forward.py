"""Seconds per forward of this pack, diffusers and the official code, in turn in one run, on the same weights.

    python benchmarks/forward.py --gpus 1 2
    python benchmarks/forward.py --gpus 1 2 --systems ours ours:compiled diffusers:compiled official:/path/to/Wan2.2
    python benchmarks/forward.py --model tiny --gpus 1 2 --sizes 64x48x5          (any machine)

    python benchmarks/forward.py --gpus 1 2 --variants --results variants.jsonl

Prints and appends to the results, per system, size and number of GPUs: seconds (median), TFLOP/s per GPU, the share of
the floor that its matrix products and attention would take alone, milliseconds per block of attention, matrix products,
communication, the rest and idling, peak memory, and how far from the first system's the output is and, for this pack,
the latents after a few steps. table.py makes a table and a plot of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from breakdown import block_times, floor_seconds, work
from pack import RESULTS, mount_pack
from random_models import model_config

SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}
STORE = "WAN_BENCHMARK_STORE"
VARIANTS = (
    "ours", "ours:compiled", "ours:triton", "ours:fp8", "ours:compiled+fp8", "ours:triton+fp8",
    "ours:compiled+fp8+fa3-fp8", "ours:triton+fp8+fa3-fp8", "ours:triton+symmetric",
    "ours:triton+symmetric+fp8+fa3-fp8", "ours:triton+sol",
)  # fmt: skip
"""Of this pack, by what `systems.Ours` reads off them; the first is what the others are compared with."""
SIGMAS = (1.0, 0.97, 0.94, 0.89, 0.83, 0.75, 0.63, 0.42, 0.0)
"""Of the Euler steps after which latents are compared: eight at a shift of 5."""


def parse_size(text: str) -> tuple[int, int, int]:
    width, height, frames = SIZES[text] if text in SIZES else map(int, text.split("x"))
    return width, height, frames


def run_rank(arguments: argparse.Namespace) -> None:
    """Times every system on this rank; rank 0 writes the results."""
    import torch
    import torch.distributed as dist
    from systems import Place
    from wan_pack.distributed.parallel.mesh import Mesh

    torch.set_grad_enabled(False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = None
    if world > 1:
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=dist.FileStore(os.environ[STORE], world), rank=rank, world_size=world,
            timeout=timedelta(minutes=2), device_id=device if cuda else None,
        )  # fmt: skip
        mesh = Mesh.of(device.type, world)
    config = model_config(arguments.model)
    references: dict[Any, Any] = {}
    for name in arguments.systems:
        if world > 1 and not cuda and name.partition(":")[0] != "ours":
            print(f"{name} spreads over GPUs only: left out", flush=True)
            continue
        try:
            measure(name, config, Place(rank, world, device, mesh), arguments, references)
        except ValueError as error:
            print(f"{name} is left out: {error}", flush=True)
        except Exception as error:
            # Most often on all ranks alike; the others' numbers are still worth having.
            traceback.print_exc()
            print(f"{name} is left out: it failed with {type(error).__name__}", flush=True)
        # A compiled model refers to itself: without this it would stay on the device, and in the next one's peak.
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(name: str, config: Any, place: Any, arguments: argparse.Namespace, references: dict[Any, Any]) -> None:
    """Times one system; rank 0 writes a line for each size.

    Args:
        place: `systems.Place`.
        references: what later systems are compared with, by size; filled by the first.
    Raises:
        ValueError: the system cannot run here.
    """
    import torch
    from systems import SYSTEMS, TEXT_ROWS

    kind, _, option = name.partition(":")
    device, world = place.device, place.world
    cuda = device.type == "cuda"
    system = SYSTEMS[kind](config, place, option)
    for size in arguments.sizes:
        width, height, frames = parse_size(size)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(config.variant.latents.shape(width, height, frames), generator=generator).to(device)
        text = torch.randn(TEXT_ROWS, config.text_dim, generator=generator).to(device)
        system.prepare(latents, text)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = time_forwards(system, arguments.repeats, cuda)
        peak = torch.cuda.max_memory_allocated(device) if cuda else 0
        tokens = latents[0].numel() // 4
        median = statistics.median(seconds)
        precision, kernel = system.precision, system.kernel.name if hasattr(system, "kernel") else ""
        floor = floor_seconds(config, tokens, world, attention=kernel, precision=precision)
        whole = system.whole(system.forward())
        reference = references.setdefault(size, whole)
        times, kernels = block_times(system, len(config.block_names))
        line = {
            "benchmark": "forward", "system": kind if kind == "official" else name, "model": arguments.model,
            "gpus": world, "size": size, "seconds": round(median, 4),
            "spread": round(max(seconds) - min(seconds), 4),
            "tflops_per_gpu": round(sum(work(config, tokens)) / median / world / 1e12, 1),
            "floor_share": round(floor / median, 3),
            "block_ms": times,
            **({"kernels": dict(list(kernels.items())[: arguments.kernels])} if arguments.kernels else {}),
            "peak_gib": round(peak / 2**30, 2),
            "difference": relative(whole, reference),
            "attention": kernel, "precision": precision,
            "device": torch.cuda.get_device_name(device) if cuda else "CPU", "torch": torch.__version__,
        }  # fmt: skip
        if kind == "ours" and arguments.latents:
            final = denoise(system, latents, text)
            line["latents_difference"] = relative(final, references.setdefault((size, "latents"), final))
        if place.rank == 0:
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def time_forwards(system: Any, repeats: int, cuda: bool) -> list[float]:
    import torch

    seconds = []
    for index in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        system.forward()
        if cuda:
            torch.cuda.synchronize()
        if index >= 2:  # the first compile and warm up
            seconds.append(time.perf_counter() - start)
    return seconds


def denoise(system: Any, latents: Any, text: Any) -> Any:
    """Euler steps from `latents` with the velocity of this pack. Returns latents [C, T, h, w] float32."""
    for step, (sigma, following) in enumerate(pairwise(SIGMAS)):
        system.enter(step, len(SIGMAS) - 1)
        system.prepare(latents, text)
        latents = latents + (following - sigma) * system.whole(system.forward())
    return latents


def relative(out: Any, expected: Any) -> str:
    return f"{((out - expected).norm() / expected.norm()).item():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t2v-A14B", help="a name in wan/model/config.py, or tiny")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", nargs="+", default=["480p", "720p"], help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    parser.add_argument(
        "--systems", nargs="+", default=["ours", "ours:compiled", "diffusers", "diffusers:compiled"],
        help="ours or diffusers, :compiled or not; official:FOLDER; ours: with any of VARIANTS' words, joined by +",
    )  # fmt: skip
    parser.add_argument("--variants", action="store_true", help="all of this pack's, instead of --systems")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--latents", action=argparse.BooleanOptionalAction, default=True, help="compare latents after a few steps"
    )
    parser.add_argument("--kernels", type=int, default=0, help="tell so many kernels: [ms per block, runs per block]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where lines are appended")
    arguments = parser.parse_args()
    if arguments.variants:
        arguments.systems = list(VARIANTS)
    mount_pack()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    for gpus in arguments.gpus:
        # Through files: torchrun's other ways to meet listen on every interface.
        with tempfile.TemporaryDirectory() as temp:
            command = [
                sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}", "--rdzv-backend=c10d",
                "--rdzv-conf=store_type=file", f"--rdzv-endpoint={temp}/agents", "--local-addr=127.0.0.1",
            ]  # fmt: skip
            environment = {**os.environ, STORE: f"{temp}/ranks"}
            subprocess.run([*command, str(Path(__file__).resolve()), *sys.argv[1:]], check=True, env=environment)


if __name__ == "__main__":
    main()
