"""What a job computes, for the planner: sizes from its files' headers."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.checkpoint.weights import COMPUTE_DTYPES, empty_model
from ...wan.model.latent_space import TEMPORAL_STRIDE
from ...wan.text.t5_keys import check_text_encoder_files, module_shapes
from ..job.job import Parallel
from ..job.model_files import FileIdentity, ModelFiles
from ..job.sampling import Sampling
from .gpu_memory import Workload
from .preflight import needs_negative

BF16_BYTES = 2


def workload_of(
    model: ModelFiles,
    sampling: Sampling,
    parallel: Parallel,
    *,
    encodes_text: bool,
    given_frames: bool = False,
    decode: bool = True,
) -> Workload:
    """Sizes of the job's parts, as they are kept on a GPU.

    Args:
        parallel: of which the precisions count.
        encodes_text: the job runs the text encoder.
        given_frames: some frames are given to a TI2V model.
    """
    sizes = [
        _expert_bytes(files, parallel.mixed_precision, parallel.linear_precision == "fp8")
        for files in (model.high_noise, model.low_noise)
        if files
    ]
    checkpoint = Checkpoint([file.path for file in model.transformer])
    text_bytes = 0
    if encodes_text:
        info = check_text_encoder_files(
            [file.path for file in model.text_encoder], [file.path for file in model.tokenizer]
        )
        text_bytes = BF16_BYTES * sum(math.prod(shape) for shape in module_shapes(info).values())
    return Workload(
        config=checkpoint.config,
        width=sampling.width,
        height=sampling.height,
        num_frames=sampling.num_frames,
        steps=len(sampling.step_range),
        experts=tuple(size.expert for size in sizes),
        block_bytes=max(size.largest_block for size in sizes),
        outside_bytes=max(size.outside for size in sizes),
        fp8=bool(checkpoint.fp8) and parallel.linear_precision != "fp8",
        vae_bytes=checkpoint.config.variant.latents.vae_bytes,
        text_bytes=text_bytes,
        guided=needs_negative(model, sampling),
        given_frames=given_frames,
        decode=decode,
    )


def workload_of_forwards(
    files: tuple[FileIdentity, ...], shape: tuple[int, ...], parallel: Parallel, *, steps: int, guided: bool
) -> Workload:
    """As `workload_of`, of one transformer alone, for a sampler elsewhere.

    Args:
        files: the transformer's.
        shape: of the latents of one evaluation, [.., T, h, w].
        steps: that are likely, to weigh loading against computing.
        guided: most steps evaluate the negative prompt too.
    """
    size = _expert_bytes(files, parallel.mixed_precision, parallel.linear_precision == "fp8")
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
        fp8=bool(checkpoint.fp8) and parallel.linear_precision != "fp8",
        guided=guided,
        given_frames=variant.known_frames,
        decode=False,
    )


class _ExpertBytes(NamedTuple):
    """Of parameters, on one GPU."""

    expert: int
    largest_block: int
    outside: int
    """Of its blocks."""


# Of the files as they are now, whose identity is the key: the jobs of a batch ask for the same again and again.
@functools.lru_cache(maxsize=8)
def _expert_bytes(files: tuple[FileIdentity, ...], mixed_precision: str, fp8_products: bool) -> _ExpertBytes:
    checkpoint = Checkpoint([file.path for file in files])
    model = empty_model(checkpoint, COMPUTE_DTYPES[mixed_precision], fp8_products=fp8_products)
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in model.running_order]
    expert = sum(parameter.nbytes for parameter in model.parameters())
    return _ExpertBytes(expert, max(blocks), expert - sum(blocks))
