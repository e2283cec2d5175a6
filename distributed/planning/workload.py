"""What a job computes, for the planner: sizes from its files' headers."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.checkpoint.keeping import Keeping
from ...wan.checkpoint.weights import COMPUTE_DTYPES, empty_model
from ...wan.lora.lora import Lora
from ...wan.model.config import HIGH_NOISE, LOW_NOISE
from ...wan.model.latent_space import TEMPORAL_STRIDE
from ...wan.text.t5_keys import check_text_encoder_files, module_shapes
from ...wan.vae.vae_keys import check_vae_file
from ...wan.vision.clip_keys import check_clip_files
from ..job.job import Parallel
from ..job.model_files import FileIdentity, LoraFile, ModelFiles
from ..job.sampling import Sampling
from ..job.setting import numbers_in
from .gpu_memory import Workload
from .preflight import needs_negative

BF16_BYTES = 2


def workload_of(
    model: ModelFiles,
    sampling: Sampling,
    parallel: Parallel,
    *,
    encodes_text: bool,
    looks: bool = False,
    given_frames: bool = False,
    decode: bool = True,
    encode_frames: int = 0,
    controls: int = 0,
    references: int = 0,
) -> Workload:
    """Sizes of the job's parts, as they are kept on a GPU.

    Args:
        parallel: of which the precisions count.
        encodes_text: the job runs the text encoder.
        looks: it runs CLIP.
        given_frames: some frames are given to a TI2V model.
        encode_frames: that the VAE encodes at once.
        controls, references: of a VACE model.
    """
    keeping = keeping_of(parallel)
    sizes = [
        _expert_bytes(files, loras, expert, parallel.mixed_precision, keeping)
        for expert, files, loras in (
            (HIGH_NOISE, model.high_noise, model.high_noise_loras),
            (LOW_NOISE, model.low_noise, model.low_noise_loras),
        )
        if files
    ]
    checkpoint = Checkpoint([file.path for file in model.transformer])
    text_bytes = 0
    if encodes_text:
        info = check_text_encoder_files(
            [file.path for file in model.text_encoder], [file.path for file in model.tokenizer]
        )
        text_bytes = BF16_BYTES * sum(math.prod(shape) for shape in module_shapes(info).values())
    clip_bytes = 0
    if looks:
        shapes = check_clip_files([file.path for file in model.clip_vision]).shapes
        clip_bytes = BF16_BYTES * sum(math.prod(shape) for shape in shapes.values())
    return Workload(
        config=checkpoint.config,
        width=sampling.width,
        height=sampling.height,
        num_frames=sampling.num_frames,
        steps=len(sampling.step_range),
        experts=tuple(size.expert for size in sizes),
        block_bytes=max(size.largest_block for size in sizes),
        outside_bytes=max(size.outside for size in sizes),
        unpacked=_unpacks(checkpoint, parallel),
        vae_bytes=checkpoint.config.variant.latents.vae_bytes,
        vae_upscale=check_vae_file(model.vae[0].path).upscale if decode else 1,
        text_bytes=text_bytes,
        clip_bytes=clip_bytes,
        guided=needs_negative(model, sampling),
        given_frames=given_frames,
        decode=decode,
        encode_frames=encode_frames,
        controls=controls,
        references=references,
    )


def workload_of_forwards(
    files: tuple[FileIdentity, ...],
    shape: tuple[int, ...],
    parallel: Parallel,
    *,
    steps: int,
    guided: bool,
    loras: tuple[LoraFile, ...] = (),
    expert: str | None = None,
    controls: int = 0,
) -> Workload:
    """As `workload_of`, of one transformer alone, for a sampler elsewhere.

    Args:
        files: the transformer's.
        shape: of the latents of one evaluation, [.., T, h, w].
        steps: that are likely, to weigh loading against computing.
        guided: most steps evaluate the negative prompt too.
        expert: HIGH_NOISE or LOW_NOISE, for a LoRA file that holds both experts' changes.
        controls: of a VACE model.
    """
    size = _expert_bytes(files, loras, expert, parallel.mixed_precision, keeping_of(parallel))
    checkpoint = Checkpoint([file.path for file in files])
    frames, rows, columns = shape[-3:]
    variant = checkpoint.config.variant
    return Workload(
        config=checkpoint.config,
        # Whole tokens; an area's latents may be odd.
        width=-(-columns // 2) * variant.latents.pixel_multiple,
        height=-(-rows // 2) * variant.latents.pixel_multiple,
        num_frames=(frames - 1) * TEMPORAL_STRIDE + 1,
        steps=steps,
        experts=(size.expert,),
        block_bytes=size.largest_block,
        outside_bytes=size.outside,
        unpacked=_unpacks(checkpoint, parallel),
        guided=guided,
        given_frames=variant.known_frames,
        decode=False,
        controls=controls,
    )


class _ExpertBytes(NamedTuple):
    """Of parameters, on one GPU."""

    expert: int
    largest_block: int
    outside: int
    """Of its blocks."""


def keeping_of(parallel: Parallel) -> Keeping:
    """How the weights of a job's experts are kept."""
    return Keeping(parallel.linear_precision, parallel.quantised_loras, numbers_in(parallel.exact_blocks))


def _unpacks(checkpoint: Checkpoint, parallel: Parallel) -> bool:
    """Whether large weights are unpacked for a use, as they are where products are not of codes."""
    by_codes = parallel.linear_precision == "fp8" and not (parallel.exact_steps or parallel.exact_blocks)
    return not by_codes and bool(keeping_of(parallel).weights(checkpoint))


# Of the files as they are now, whose identity is the key: the jobs of a batch ask for the same again and again.
@functools.lru_cache(maxsize=8)
def _expert_bytes(
    files: tuple[FileIdentity, ...],
    loras: tuple[LoraFile, ...],
    expert: str | None,
    mixed_precision: str,
    keeping: Keeping,
) -> _ExpertBytes:
    checkpoint = Checkpoint([file.path for file in files])
    opened = [
        Lora(lora.file.path, lora.strength, checkpoint.shapes, expert=expert, selection=lora.selection)
        for lora in loras
    ]
    model = empty_model(checkpoint, COMPUTE_DTYPES[mixed_precision], opened, keeping)
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in model.units]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return _ExpertBytes(whole, max(blocks), whole - sum(blocks))
