"""What a finished job says of itself: result.json."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...wan.model.int8_products import int8_products_there
from ..job.job import VERSION, Job, ModelFiles, Parallel
from ..parallel.opened_memory import way_of
from ..parallel.parallelize import chosen_engine
from .session import Session

Peaks = list[list[int]]
"""[[peak GPU bytes, peak host bytes]] of every rank, in rank order."""


def gather_peaks(session: Session) -> Peaks:
    """Up to now; every rank must call it."""
    device = session.device
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = torch.tensor([gpu, host], device=device)
    if session.mesh is None:
        return [mine.tolist()]
    everyone = mine.new_empty(session.world * 2)
    dist.all_gather_into_tensor(everyone, mine, group=session.group)
    return everyone.view(session.world, 2).tolist()


def video_size(job: Job, session: Session) -> dict[str, int]:
    """Pixels: the job's, or twice as many in each direction where the VAE makes them."""
    scale = session.vae(job).upscale
    return {"width": job.sampling.width * scale, "height": job.sampling.height * scale}


def result_of(
    job: Job,
    session: Session,
    *,
    frames: int,
    latents_shape: list[int],
    phases: dict[str, float],
    step_seconds: list[float],
    reused: list[int],
    peaks: Peaks,
    notes: list[str],
) -> dict[str, Any]:
    """The object for result.json.

    Args:
        frames: of the video; 0 if none was made.
        phases: name -> seconds.
        reused: indices of the steps that the model was not asked for.
        notes: for the status, of what only the run could know.
    """
    sampling = job.sampling
    video = {**video_size(job, session), "frames": frames, "fps": sampling.fps} if frames else None
    return {
        "id": job.id,
        "version": VERSION,
        "latents": {"shape": latents_shape, "dtype": "float32"},
        "video": video,
        "phases": phases,
        "step_seconds": step_seconds,
        "reused_steps": reused,
        "peak_gpu_bytes": [gpu for gpu, _ in peaks],
        "peak_rss_bytes": [host for _, host in peaks],
        "settings": settings_of(job, session) | _reused(job, reused),
        "warnings": [*job.warnings, *notes],
    }


def _sequence(job: Job, session: Session) -> str:
    parallel = job.parallel
    if session.mesh is None or not parallel.use_ulysses or parallel.ulysses_size == 1:
        return "off"
    engine = chosen_engine(parallel.ulysses_engine, session.device.type)
    if engine == "symmetric":
        engine = way_of(session.mesh.ulysses_group)
    return f"Ulysses over {parallel.ulysses_size} GPUs, {engine}"


def _sparse(job: Job, session: Session) -> str:
    if session.sparse is None:
        return ""
    return f", tau {session.sparse.tau:g}, in {len(session.sparse.steps)} of {len(job.sampling.step_range)} steps"


def _reused(job: Job, reused: list[int]) -> dict[str, str]:
    threshold, steps = job.sampling.reuse_threshold, job.sampling.step_range
    return {"reused steps": f"{len(reused)} of {len(steps)} (reuse_threshold {threshold:g})"} if threshold else {}


def _keep_warm(parallel: Parallel) -> str:
    if parallel.more_follow:
        return "until the batch is done"
    return f"{parallel.keep_warm_seconds:g} s" if parallel.stays else "off"


def _linears(parallel: Parallel, device: torch.device) -> str:
    precision = parallel.linear_precision
    if precision != "int8":
        return "" if precision == "full" else f", large matrix products {precision}"
    by_codes = device.type == "cuda" and int8_products_there()
    return f", large weights int8, {'multiplied by comfy-kitchen' if by_codes else 'unpacked for each use'}"


def _loras(model: ModelFiles) -> str:
    """ "high lightning 1, style 0.5; low lightning 1", by file name and strength."""
    sides = {"high": model.high_noise_loras, "low": model.low_noise_loras}
    texts = [
        f"{side} " + ", ".join(f"{Path(lora.file.path).stem} {lora.strength:g}" for lora in loras)
        for side, loras in sides.items()
        if loras
    ]
    return "; ".join(texts) or "none"


def settings_of(job: Job, session: Session) -> dict[str, str | int | float | bool]:
    """What was in effect, for the status."""
    parallel, sampling, device = job.parallel, job.sampling, session.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    vae_dtype = str(session.vae_dtype(job)).removeprefix("torch.")
    steps = sampling.step_range
    part = (
        ""
        if len(steps) == sampling.schedule_steps
        else f" ({steps.start} to {steps.stop} of {sampling.schedule_steps})"
    )
    return {
        "device": f"{session.world} x {name}",
        "sequence parallel": _sequence(job, session),
        "cfg parallel": parallel.cfg_parallel,
        "fsdp": f"gathers one {parallel.gather}" if parallel.use_fsdp and session.world > 1 else False,
        "offload": parallel.offload_model,
        "streamed blocks": parallel.stream_blocks,
        "memory optimization": parallel.memory_optimization,
        "compiled": parallel.torch_compile,
        "precision": f"{parallel.mixed_precision}{_linears(parallel, device)}, VAE {vae_dtype}",
        "kernels": session.ops,
        "attention": f"{session.kernel.name} ({session.kernel.reason}){_sparse(job, session)}",
        "LoRAs": _loras(job.model),
        "solver": f"{sampling.solver}, {sampling.steps} steps{part}, shift {sampling.shift:g}",
        "guidance": f"{sampling.guidance_high:g} high, {sampling.guidance_low:g} low",
        "keep warm": _keep_warm(parallel),
        "torch": torch.__version__,
    }
