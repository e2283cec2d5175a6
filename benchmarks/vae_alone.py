"""What `vae_socket.py` compares with: the same VAEs on ranks that do nothing else, and diffusers' in float32."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pack import mount_pack
from random_models import model_config, write_vae
from real_jobs import Shape

if TYPE_CHECKING:
    from torch import Tensor
    from vae_rank import VaeRank

WAYS = ("decode", "encode")
ALONE = "alone.json"
"""[model, way, size, GPUs, precision, seconds, error of diffusers' VAE or null] of the first size."""


def write_given(folder: Path, models: Sequence[str], sizes: Sequence[str]) -> None:
    """What varies over a few pixels and frames, float32: latents [1, C, T, h, w] of ComfyUI; frames [1, 3, F, H, W]."""
    from safetensors.torch import save_file
    from wan_pack.wan.vae.latents import denormalise

    for size in sizes:
        width, height, frames = Shape("t2v-A14B", size).pixels
        picture = _smooth((3, frames, height, width), 32).tanh_()
        for model in models:
            variant = model_config(model).variant
            latents = denormalise(_smooth(variant.latents.shape(width, height, frames), 4), variant.channels[1])
            for way, given in (("decode", latents), ("encode", picture)):
                save_file({"given": given[None].contiguous()}, _given_file(folder, way, model, size))


def _smooth(shape: tuple[int, ...], step: int) -> Tensor:
    import torch
    import torch.nn.functional as F

    channels, *sizes = shape
    coarse = (max(n // s, 1) for n, s in zip(sizes, (4, step, step), strict=True))
    noise = torch.randn(1, channels, *coarse, generator=torch.Generator().manual_seed(1))
    made = F.interpolate(noise, size=sizes, mode="trilinear")[0]
    return made / made.std()


def given_to(folder: Path, way: str, model: str, size: str) -> Tensor:
    from safetensors.torch import load_file

    return load_file(_given_file(folder, way, model, size))["given"]


def _given_file(folder: Path, way: str, model: str, size: str) -> Path:
    return folder / f"given-{way}-{model}-{size}.safetensors"


def exact_file(folder: Path, model: str, way: str) -> Path:
    """Of what diffusers makes in float32, of the first size."""
    return folder / f"exact-{model}-{way}.safetensors"


def difference(exact: Tensor, made: Tensor) -> float:
    return ((exact - made).norm() / exact.norm()).item()


def run_rank(rank: int, world: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Writes ALONE and the exact files into the folder."""
    mount_pack()
    import torch
    from vae_rank import VaeRank

    bench = VaeRank(rank, world, arguments, folder)
    rows, precision = [], "bf16" if bench.dtype == torch.bfloat16 else "fp32"
    for model in arguments.models:
        errors = _exact(bench, model) if rank == 0 and arguments.exact else {}
        bench.barrier()
        for way, size, gpus, seconds in _timed(bench, model):
            rows.append((model, way, size, gpus, precision, seconds, errors.get(way)))
    if rank == 0:
        (folder / ALONE).write_text(json.dumps(rows))


def _timed(bench: VaeRank, model: str) -> list[tuple[str, str, int, float]]:
    """Way, size, GPUs and seconds from the host's memory, where it is given, until the result lies whole there."""
    from wan_pack.distributed.parallel.split_vae import RankVae
    from wan_pack.wan.vae.latents import normalise

    arguments, rows = bench.arguments, []
    file = [write_vae(arguments.folder, model)]
    ops = "triton" if bench.device.type == "cuda" else "plain"
    for gpus in arguments.gpus:
        vae = None
        if bench.rank < gpus:
            vae = RankVae(file, dtype=bench.dtype, device=bench.device, group=bench.groups.get(gpus), ops=ops)
        size = arguments.sizes[0]
        for way in WAYS:
            given = given_to(bench.folder, way, model, size)
            latents = normalise(given, given.shape[1]) if way == "decode" else given

            def run(vae: Any = vae, way: str = way, given: Tensor = latents) -> object:
                made = vae.decode(given, clamp=False) if way == "decode" else [vae.encode(given)]
                return [None if part is None else part.cpu() for part in made]

            rows.append((way, size, gpus, bench.seconds(gpus, run)[0]))
    return rows


def _exact(bench: VaeRank, model: str) -> dict[str, float]:
    """How far diffusers' own VAE is in the bench's precision from itself in float32."""
    import torch
    import vae_before
    from safetensors.torch import save_file
    from wan_pack.wan.vae.autoencoder import load_vae
    from wan_pack.wan.vae.latents import denormalise, normalise

    file, errors = [write_vae(bench.arguments.folder, model)], {}
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    for way in WAYS:
        given = given_to(bench.folder, way, model, bench.arguments.sizes[0]).to(bench.device)
        made = []
        for dtype in (torch.float32, bench.dtype):
            vae = load_vae(file, dtype=dtype, device=bench.device)
            if way == "decode":
                parts = vae_before.decode(vae, normalise(given, given.shape[1]), None)
                made.append(torch.cat([part.float().cpu() for part in parts if part is not None], dim=1))
            else:
                code = vae_before.encode(vae, given, None)
                made.append(denormalise(code, code.shape[1])[0].float().cpu())
            del vae
        save_file({"made": made[0].contiguous()}, exact_file(bench.folder, model, way))
        errors[way] = difference(*made)
    torch.backends.cudnn.allow_tf32 = allowed
    return errors
