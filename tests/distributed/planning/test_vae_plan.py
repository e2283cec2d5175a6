"""How much memory ComfyUI's VAE nodes are planned with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob
from wan_pack.distributed.planning.gpu_memory import FRAME_BYTES, process_bytes
from wan_pack.distributed.planning.vae_plan import held_bytes, needed_bytes, working_bytes
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace

FILE = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)


def job(space: LatentSpace, *, encode: bool, upscale: int = 1, frames: int = 81, **parallel: Any) -> VaeJob:
    """480 x 832 pixels."""
    rows, columns = 480 // space.stride, 832 // space.stride
    latents = (1, space.channels, (frames - 1) // 4 + 1, rows, columns)
    video = (1, 3, frames, 480 * upscale, 832 * upscale)
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
    assert needed_bytes(asked) == held_bytes(asked) + working + process_bytes(asked.parallel, working)


@pytest.mark.parametrize("gpus", [1, 4])
def test_frames_to_encode_are_there_twice(gpus: int):
    """As they came, and as the VAE takes them; each rank has its rows. Frames that are decoded are not kept there."""
    encoding, decoding = (job(WAN21, encode=encode, gpu_count=gpus) for encode in (True, False))
    rows = 480 // gpus
    assert working_bytes(encoding) - working_bytes(decoding) == 2 * 81 * FRAME_BYTES * 832 * rows
    shorter = job(WAN21, encode=False, frames=5, gpu_count=gpus)
    assert working_bytes(shorter) == working_bytes(decoding)


def test_a_vae_of_twice_the_size_takes_more():
    once, twice = (job(WAN21, encode=False, upscale=upscale) for upscale in (1, 2))
    assert working_bytes(twice) > working_bytes(once)
    assert held_bytes(dataclasses.replace(twice)) == held_bytes(once)
