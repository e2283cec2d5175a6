"""Which GPUs decode or encode for ComfyUI's VAE nodes, and what memory that takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...wan.model.latent_space import FRAMES_AT_ONCE, LATENT_SPACES, LatentSpace
from ..job.errors import counted
from ..job.job import VaeJob
from ..machine.gpus import Gpu
from .gpu_memory import GIB, VAE_FRAGMENTATION, encoding_bytes, picture_bytes, process_bytes, vae_width
from .plan import DoesNotFit


def _sizes(job: VaeJob) -> tuple[LatentSpace, tuple[int, ...], tuple[int, ...]]:
    """The latents' space, and the shapes of latents and frames."""
    latents, frames = (job.made, job.given) if job.encode else (job.given, job.made)
    return LATENT_SPACES[latents[1]], latents, frames


def held_bytes(job: VaeJob) -> int:
    """Of the VAE on each GPU."""
    space, _, _ = _sizes(job)
    return space.vae_bytes * vae_width(job.parallel) // 2


def working_bytes(job: VaeJob, at_once: int = FRAMES_AT_ONCE) -> int:
    """On each GPU beside the VAE, for one of the videos. at_once: frames that are decoded."""
    space, latents, frames = _sizes(job)
    width, height = latents[4] * space.stride, latents[3] * space.stride
    if job.encode:
        return encoding_bytes(space, width, height, frames[2], job.parallel)
    return picture_bytes(space, width, height, frames[2], frames[4] // width, job.parallel, at_once)


def needed_bytes(job: VaeJob, at_once: int = FRAMES_AT_ONCE) -> int:
    """On each GPU, of processes that hold nothing else."""
    working = working_bytes(job, at_once)
    return held_bytes(job) + working + process_bytes(job.parallel, working, gaps=VAE_FRAGMENTATION)


def check_fits(job: VaeJob, gpus: Sequence[Gpu]) -> None:
    """Raises DoesNotFit if one of the job's GPUs has less memory free than it needs, one frame at a time.

    Args:
        gpus: all that there are.
    """
    free = min(gpu.free_bytes for gpu in gpus if gpu.index in job.parallel.gpu_ids)
    needed = needed_bytes(job, 1)
    if needed > free:
        _, _, frames = _sizes(job)
        where = "the GPU" if job.parallel.gpu_count == 1 else f"each of {job.parallel.gpu_count} GPUs"
        raise DoesNotFit(
            f"{'encoding' if job.encode else 'decoding'} {frames[4]}x{frames[3]} needs about {needed / GIB:.1f} GiB on "
            f"{where}, where {free / GIB:.1f} GiB are free; smaller tiles need less (VAE Decode (Tiled), VAE Encode "
            "(Tiled))",
            None,
        )


def on_gpus(job: VaeJob, gpus: Sequence[Gpu], gpu_count: int) -> VaeJob:
    """The job on as many GPUs as it has memory on, and rows of latents for.

    Args:
        gpus: to choose from, in the order in which equal ones are taken.
        gpu_count: that must be taken; 0: as many as can be.
    Raises:
        DoesNotFit: there is too little memory free on them.
    """
    _, latents, _ = _sizes(job)
    most = max(1, min(len(gpus), latents[3]))
    chosen = [gpu_count] if gpu_count else range(most, 0, -1)
    problem: DoesNotFit | None = None
    for count in chosen:
        roomy = sorted(gpus, key=lambda gpu: -gpu.free_bytes)[:count]
        ids = tuple(gpu.index for gpu in gpus if gpu in roomy)
        tried = dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, gpu_count=count, gpu_ids=ids))
        try:
            check_fits(tried, gpus)
        except DoesNotFit as error:
            problem = problem or error
        else:
            return tried
    assert problem is not None
    raise problem


def described(job: VaeJob) -> str:
    """One line for the log."""
    _, _, frames = _sizes(job)
    videos = "" if frames[0] == 1 else f"{frames[0]} x "
    where = f"GPUs {', '.join(job.parallel.gpu_ids)}" if job.parallel.gpu_ids else ""
    where = where or counted(job.parallel.gpu_count, "CPU process", "CPU processes")
    what = "encodes" if job.encode else "decodes"
    return f"the VAE {what} {videos}{counted(frames[2], 'frame')} of {frames[4]}x{frames[3]} on {where}"
