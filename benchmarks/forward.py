"""Seconds per forward of this pack, diffusers and the official code, in turn in one run, on the same weights.

    python benchmarks/forward.py --gpus 1 2
    python benchmarks/forward.py --gpus 1 2 --systems ours ours:compiled diffusers:compiled official:/path/to/Wan2.2
    python benchmarks/forward.py --model tiny --gpus 1 2 --sizes 64x48x5          (any machine)

Prints and appends to results.jsonl, per system, size and number of GPUs: seconds (median), TFLOP/s per GPU, shares of
the time in attention, matrix products, communication and the rest, peak memory, and how far the output is from the
first system's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from real_size import append_results, mount_pack, tiny_config

SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}
STORE = "WAN_BENCHMARK_STORE"
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn_generated"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "mkldnn_linear", "aten::mm", "linear"),
    "communication": ("nccl", "gloo", "all_to_all", "all_gather"),
}
"""Kind of work -> what the names of its kernels hold; everything else is elementwise."""


def flops(config: Any, tokens: int) -> float:
    """Of one forward: matrix products and self-attention; what does not grow with the tokens is left out."""
    linear = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    attention = 2 * tokens * config.dim + 2 * 512 * config.dim
    return 2.0 * tokens * config.num_layers * (linear + attention)


def parse_size(text: str) -> tuple[int, int, int]:
    width, height, frames = SIZES[text] if text in SIZES else map(int, text.split("x"))
    return width, height, frames


def run_rank(arguments: argparse.Namespace) -> None:
    """Times every system on this rank; rank 0 writes the results."""
    import torch
    import torch.distributed as dist
    from systems import SYSTEMS, TEXT_ROWS, Place
    from wan_pack.distributed.mesh import Mesh
    from wan_pack.wan.config import WAN_CONFIGS
    from wan_pack.wan.latents import latents_shape

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
            device_id=device if cuda else None,
        )  # fmt: skip
        mesh = Mesh.of(device.type, world)
    config = tiny_config() if arguments.model == "tiny" else WAN_CONFIGS[arguments.model]
    references: dict[str, Any] = {}
    for name in arguments.systems:
        kind, _, option = name.partition(":")
        if world > 1 and not cuda and kind != "ours":
            print(f"{kind} spreads over GPUs only: left out", flush=True)
            continue
        system = SYSTEMS[kind](config, Place(rank, world, device, mesh), option)
        for size in arguments.sizes:
            width, height, frames = parse_size(size)
            generator = torch.Generator().manual_seed(0)
            latents = torch.randn(latents_shape(width, height, frames, config.out_dim), generator=generator).to(device)
            text = torch.randn(TEXT_ROWS, config.text_dim, generator=generator).to(device)
            system.prepare(latents, text)
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            seconds = time_forwards(system, arguments.repeats, cuda)
            work = flops(config, latents[0].numel() // 4)
            whole = system.whole(system.forward())
            reference = references.setdefault(size, whole)
            line = {
                "benchmark": "forward", "system": kind if kind == "official" else name, "model": arguments.model,
                "gpus": world, "size": size, "seconds": round(statistics.median(seconds), 4),
                "spread": round(max(seconds) - min(seconds), 4),
                "tflops_per_gpu": round(work / statistics.median(seconds) / world / 1e12, 1),
                "shares": shares(system),
                "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if cuda else 0.0,
                "difference": f"{((whole - reference).norm() / reference.norm()).item():.1e}",
                "attention": system.kernel.name if hasattr(system, "kernel") else "",
                "device": torch.cuda.get_device_name(device) if cuda else "CPU", "torch": torch.__version__,
            }  # fmt: skip
            if rank == 0:
                append_results(line)
                print(json.dumps(line), flush=True)
        del system
        if cuda:
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


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


def shares(system: Any) -> dict[str, float]:
    """Kind of work -> share of the time that kernels ran (operators, on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    cuda = system.place.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        system.forward()
    totals = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for event in trace.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        key = event.key.lower()
        kind = next((k for k, words in KINDS.items() if any(word in key for word in words)), "elementwise")
        totals[kind] += spent
    whole = sum(totals.values()) or 1.0
    return {kind: round(spent / whole, 3) for kind, spent in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t2v-A14B", help="a name in wan/config.py, or tiny")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", nargs="+", default=["480p", "720p"], help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    parser.add_argument(
        "--systems", nargs="+", default=["ours", "ours:compiled", "diffusers", "diffusers:compiled"],
        help="ours or diffusers, :compiled or not; official:FOLDER",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
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
