"""How much memory ComfyUI's VAE nodes are planned with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob
from wan_pack.distributed.planning.gpu_memory import (
    ENCODER_PIXEL_BYTES,
    FRAME_BYTES,
    GIB,
    VAE_FRAGMENTATION,
    process_bytes,
)
from wan_pack.distributed.planning.vae_plan import held_bytes, needed_bytes, working_bytes
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace

FILE = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)


def job(
    space: LatentSpace, *, encode: bool, upscale: int = 1, frames: int = 81, size: tuple[int, int] = (832, 480),
    **parallel: Any,
) -> VaeJob:  # fmt: skip
    width, height = size
    latents = (1, *space.shape(width, height, frames))
    video = (1, 3, frames, height * upscale, width * upscale)
    given, made = (video, latents) if encode else (latents, video)
    layout = Parallel(**{"gpu_count": 1, **parallel})
    return VaeJob(id="0f", vae=(FILE,), encode=encode, given=given, made=made, parallel=layout)


@pytest.mark.parametrize("space", [WAN21, WAN22], ids=["Wan2.1", "Wan2.2"])
@pytest.mark.parametrize(("precision", "wide"), [("bf16", 1), ("fp32", 2)])
def test_the_vae_and_what_it_works_with_are_counted_in_its_precision(space: LatentSpace, precision: str, wide: int):
    asked = job(space, encode=False, mixed_precision=precision)
    assert held_bytes(asked) == wide * space.vae_bytes
    working = working_bytes(asked)
    assert working == wide * working_bytes(job(space, encode=False))
    assert needed_bytes(asked) == held_bytes(asked) + working + process_bytes(
        asked.parallel, working, gaps=VAE_FRAGMENTATION
    )


@pytest.mark.parametrize("gpus", [1, 4])
def test_what_becomes_of_frames_is_counted_and_frames_are_not(gpus: int):
    """Each rank has its rows: of every frame what the encoder makes, or the latents that it is decoded from."""
    long, short = (job(WAN21, encode=True, frames=frames, gpu_count=gpus) for frames in (81, 5))
    assert working_bytes(long) - working_bytes(short) == 76 * ENCODER_PIXEL_BYTES[16][1] * 832 * 480 // gpus
    long, short = (job(WAN21, encode=False, frames=frames, gpu_count=gpus) for frames in (81, 5))
    assert working_bytes(long) - working_bytes(short) == 76 * 832 * 480 // gpus


@pytest.mark.parametrize(
    ("size", "gpus", "gib"),
    [((832, 480), 1, 2.84), ((1280, 720), 1, 6.2), ((832, 480), 2, 1.73), ((1280, 720), 2, 3.62)],
)
def test_encoding_takes_no_more_than_is_planned_and_not_much_less(size: tuple[int, int], gpus: int, gib: float):
    """As measured in bf16 when all 81 frames were on the GPU. On one GPU a convolution took less memory than on two."""
    asked = job(WAN21, encode=True, gpu_count=gpus, size=size)
    planned = (held_bytes(asked) + working_bytes(asked)) / GIB
    gib -= 81 * FRAME_BYTES * math.prod(size) / gpus / GIB
    assert gib < planned < gib * (1.19 if gpus == 1 else 1.06)


def test_a_vae_of_twice_the_size_takes_more():
    once, twice = (job(WAN21, encode=False, upscale=upscale) for upscale in (1, 2))
    assert working_bytes(twice) > working_bytes(once)
    assert held_bytes(dataclasses.replace(twice)) == held_bytes(once)
