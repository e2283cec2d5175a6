"""What a finished job says of itself: result.json."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...wan.model.int8_products import int8_products_there
from ..job.errors import counted
from ..job.job import VERSION, ForwardsJob, GroupJob, Job, LoraFile, Parallel, VaeJob
from ..job.sampling import rounded_steps
from ..job.setting import numbers_in, text_of
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
    job: GroupJob, session: Session, *, phases: dict[str, float], step_seconds: list[float], peaks: Peaks,
    spans: Sequence[tuple[str, float, float]] = (), notes: Sequence[str] = (), reused: Sequence[int] | None = None,
    **made: Any,
) -> dict[str, Any]:  # fmt: skip
    """The object for result.json.

    Args:
        phases: name -> seconds.
        spans: of rank 0 (`RankFiles.spans`).
        notes: for the status, of what only the run could know.
        reused: indices of the steps that the model was not asked for; None where the job has no steps.
        made: what only this kind of job has.
    """
    return {
        "id": job.id,
        "version": VERSION,
        **made,
        "phases": phases,
        "spans": spans,
        "step_seconds": step_seconds,
        **({} if reused is None else {"reused_steps": reused}),
        "peak_gpu_bytes": [gpu for gpu, _ in peaks],
        "peak_rss_bytes": [host for _, host in peaks],
        "settings": settings_of(job, session) | _reused(job, reused or ()),
        "warnings": [*job.warnings, *notes],
    }


def video_of(job: Job, session: Session, *, frames: int, latents_shape: list[int]) -> dict[str, Any]:
    """What result.json says of a video.

    Args:
        frames: 0 if none was made.
    """
    video = (
        {**video_size(job, session), "frames": frames, "fps": job.sampling.fps, "format": job.sampling.video_format}
        if frames
        else None
    )
    return {"latents": {"shape": latents_shape, "dtype": "float32"}, "video": video}


def _sequence(job: GroupJob, session: Session) -> str:
    parallel = job.parallel
    if session.mesh is None or not parallel.use_ulysses or parallel.ulysses_size == 1:
        return "off"
    engine = chosen_engine(parallel.ulysses_engine, session.device.type)
    if engine == "symmetric":
        engine = way_of(session.mesh.ulysses_group)
    return f"Ulysses over {parallel.ulysses_size} GPUs, {engine}"


def _reused(job: GroupJob, reused: Sequence[int]) -> dict[str, str]:
    if not isinstance(job, Job) or not job.sampling.reuse_threshold:
        return {}
    steps, threshold = job.sampling.step_range, job.sampling.reuse_threshold
    return {"reused steps": f"{len(reused)} of {len(steps)} (reuse_threshold {threshold:g})"}


def _exact(job: GroupJob) -> dict[str, str]:
    """What was not rounded to 8 bits though the rest was."""
    parallel = job.parallel
    if not parallel.rounds or isinstance(job, VaeJob):
        return {}
    parts = []
    if parallel.exact_steps:
        first_and_last = f"the first and last {counted(parallel.exact_steps, 'step')}"
        if isinstance(job, Job):
            steps = job.sampling.step_range
            exact = len(steps) - rounded_steps(steps, job.sampling.schedule_steps, parallel.exact_steps)
            first_and_last += f" ({exact} of {len(steps)})"
        parts.append(first_and_last)
    if numbers := numbers_in(parallel.exact_blocks):
        parts.append(f"{'block' if len(numbers) == 1 else 'blocks'} {text_of(numbers)}")
    return {"not in 8 bits": "; ".join(parts)} if parts else {}


def _linears(parallel: Parallel, device: torch.device) -> str:
    precision = parallel.linear_precision
    if precision != "int8":
        return "" if precision == "full" else f", large matrix products {precision}"
    by_codes = device.type == "cuda" and int8_products_there()
    return f", large weights int8, {'multiplied by comfy-kitchen' if by_codes else 'unpacked for each use'}"


def _loras(**given: tuple[LoraFile, ...]) -> str:
    """ "high lightning 1, style 0.5; low lightning 1", by file name and strength."""

    def one(lora: LoraFile) -> str:
        selected = f" ({lora.selection})" if str(lora.selection) else ""
        return f"{Path(lora.file.path).stem} {lora.strength:g}{selected}"

    texts = [f"{side} ".lstrip() + ", ".join(map(one, loras)) for side, loras in given.items() if loras]
    return "; ".join(texts) or "none"


def settings_of(job: GroupJob, session: Session) -> dict[str, str | int | float | bool]:
    """What was in effect, for the status."""
    parallel, device = job.parallel, session.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    vae = f", VAE {str(session.vae_dtype(job)).removeprefix('torch.')}" if isinstance(job, Job | VaeJob) else ""
    sparse = ""
    if session.sparse is not None and isinstance(job, Job):
        steps = len(job.sampling.step_range)
        sparse = f", tau {session.sparse.tau:g}, in {len(session.sparse.steps)} of {steps} steps"
    warm = f"{parallel.keep_warm_seconds:g} s" if parallel.stays else "off"
    own = {"LoRAs": _loras(**{"": job.loras})} if isinstance(job, ForwardsJob) else {}
    return {
        "device": f"{session.world} x {name}",
        "sequence parallel": _sequence(job, session),
        "cfg parallel": parallel.cfg_parallel,
        "fsdp": f"gathers one {parallel.gather}" if parallel.use_fsdp and session.world > 1 else False,
        "offload": parallel.offload_model,
        "streamed blocks": parallel.stream_blocks,
        "memory optimization": parallel.memory_optimization,
        "compiled": parallel.torch_compile,
        "precision": f"{parallel.mixed_precision}{_linears(parallel, device)}{vae}",
        "kernels": session.ops,
        "attention": f"{session.kernel.name} ({session.kernel.reason}){sparse}",
        **_exact(job),
        **(_video_settings(job) if isinstance(job, Job) else own),
        "keep warm": "until the batch is done" if parallel.more_follow else warm,
        "torch": torch.__version__,
    }


def _video_settings(job: Job) -> dict[str, str | int | float | bool]:
    sampling = job.sampling
    steps = sampling.step_range
    part = f" ({steps.start} to {steps.stop} of {sampling.schedule_steps})"
    if len(steps) == sampling.schedule_steps:
        part = ""
    return {
        "LoRAs": _loras(high=job.model.high_noise_loras, low=job.model.low_noise_loras),
        "solver": f"{sampling.solver}, {sampling.steps} steps{part}, shift {sampling.shift:g}",
        "guidance": f"{sampling.guidance_high:g} high, {sampling.guidance_low:g} low",
    }
