"""The VAE of a video and the way into its mp4, before and after the pack had a forward of its own, in one run.

    python benchmarks/vae.py --gpus 1 2 4
    python benchmarks/vae.py --gpus 1 2 --sizes 64x48x9 --base-dim 8                    (any machine)

Random weights of the true shape, scaled so that no signal dies out; latents of smooth noise. "Before" is diffusers' own
forward, split over ranks as the pack did (vae_before.py). Prints, per size and number of GPUs: seconds of a decode and
an encode (median), peak memory, how far the result is from diffusers' in float32 on the same weights, and whether all
numbers of GPUs give the same bits. Then a job's end: a decode of the latents on all GPUs, while the first writes, in
place of the random decoder's noise, the same parts of a picture that pans and grows (moving_picture.py): seconds from
the last decoded frame until the mp4 is there. Each part fails for itself; a table comes last.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from forward import parse_size
from real_size import mount_pack

X264 = (("faster", 16), ("veryfast", 16), ("veryfast", 14), ("superfast", 14))
"""Presets, and the quality that they are asked for."""


def run_rank(rank: int, world: int, arguments: argparse.Namespace, folder: Path) -> None:
    mount_pack()
    from vae_rank import VaeRank
    from wan_pack.wan.video import video
    from wan_pack.wan.video.video_formats import CRF

    bench = VaeRank(rank, world, arguments, folder)
    started = time.perf_counter()

    def attempt(part: Callable[..., None], *values: Any) -> None:
        # The first rank's clock decides for all: what one leaves out the others would wait in.
        if bench.first_says(time.perf_counter() - started > arguments.limit):
            bench.say(f"left out, {arguments.limit:g} s are over", part.__name__, *values)
            return
        try:
            part(*values)
        except Exception:
            print(f"rank {rank}: {part.__name__} {values} failed", flush=True)
            traceback.print_exc()
        bench.barrier()

    attempt(bench.load)
    attempt(bench.kernels)
    sizes, numbers = [parse_size(text) for text in arguments.sizes], arguments.gpus
    most, few = numbers[-1], list(dict.fromkeys([numbers[0], numbers[-1]]))
    for size in sizes:
        attempt(bench.decode, size, "after", numbers)
        attempt(bench.decode, size, "before", numbers)
        attempt(bench.tail, size, most, "after", ("medium", CRF))
        attempt(bench.tail, size, most, "before", None)
        if size == sizes[0]:
            attempt(bench.exactness, size)
            if bench.device.type == "cuda":
                for gpus in few:
                    attempt(bench.breakdown, size, gpus)
            attempt(bench.encode, size)
    if arguments.variants:
        for size in sizes:
            for name, crf in X264:
                attempt(bench.tail, size, most, f"after, {name} {crf}", (name, crf))
            for threads in (4, 8, 32):
                with mock.patch.object(video, "THREADS", threads):
                    attempt(bench.tail, size, most, f"after, {threads} threads", ("medium", CRF))
        size = sizes[0]
        if bench.ops == "triton":
            bench.set_ops("plain")
            attempt(bench.decode, size, "after, plain kernels", few)
            bench.set_ops("triton")
        for frames in (8, 12, 4, 24, 2, 1):
            attempt(bench.decode, size, f"after, {frames} frames at once", few, frames)
    for size in sizes[1:]:
        attempt(bench.encode, size)
    if rank == 0:
        print("\n".join(["", "table", *bench.rows]), flush=True)
    os._exit(0)


def write_weights(path: Path, base_dim: int) -> None:
    """In bf16, so that all precisions compute with the same numbers."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from safetensors.torch import save_file

    vae = AutoencoderKLWan(base_dim=base_dim)
    random_ = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in vae.state_dict().items():
        if name.endswith("gamma"):
            tensors[name] = torch.ones_like(tensor)
        else:
            noise = torch.randn(tensor.shape, generator=random_)
            tensors[name] = noise * (tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.05)
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path)


def main() -> None:
    import torch
    import torch.multiprocessing as mp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", nargs="+", default=["480p", "720p"])
    parser.add_argument("--base-dim", type=int, default=96, help="96 in the released VAE")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--variants", action="store_true", help="other presets, sizes of parts and the plain kernels")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which what is left is left out")
    arguments = parser.parse_args()
    world = max(arguments.gpus)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder, "vae.safetensors"), arguments.base_dim)
        # CUDA works in no fork; without it a fork need not import everything again.
        method = "spawn" if torch.cuda.is_available() else "fork"
        context = mp.start_processes(
            run_rank, (world, arguments, Path(folder)), nprocs=world, join=False, start_method=method
        )
        while not context.join():
            pass


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
