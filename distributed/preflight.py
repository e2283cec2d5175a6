"""Checks a job against its files before any process starts. Reads headers only."""

from __future__ import annotations

import importlib.util

from ..wan.checkpoint import Checkpoint
from ..wan.config import PATCH_SIZE, TEXT_LEN, WanConfig
from ..wan.t5_keys import check_text_encoder_files
from ..wan.vae_keys import check_vae_file
from .job import Job, ModelFiles, Sampling

VAE_STRIDE = (4, 8, 8)
"""Frames, rows and columns of the video per latent, of the Wan2.1 VAE."""
SIZE_MULTIPLE = VAE_STRIDE[1] * PATCH_SIZE[1]
"""Width and height are whole tokens: 16 pixels."""

Shape = tuple[int, ...]


def check_size(name: str, value: int) -> None:
    """Raises ValueError naming the two nearest sizes unless `value` is a whole number of tokens."""
    if value % SIZE_MULTIPLE:
        below = max(value // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE
        raise ValueError(
            f"{name} is {value}; it must be a multiple of {SIZE_MULTIPLE}. "
            f"The nearest are {below} and {below + SIZE_MULTIPLE}"
        )


def latents_shape(sampling: Sampling, channels: int) -> tuple[int, int, int, int]:
    """[C, T, H, W] of the latents of a video."""
    frames, rows, cols = VAE_STRIDE
    return (channels, (sampling.num_frames - 1) // frames + 1, sampling.height // rows, sampling.width // cols)


def needs_negative(sampling: Sampling) -> bool:
    """Whether an unconditional pass runs at all."""
    return sampling.guidance_low != 1 or sampling.guidance_high != 1


def check_model(model: ModelFiles) -> WanConfig:
    """The transformer's sizes, once the headers show that all files are what they should be and belong together.

    Raises:
        ValueError: naming the file, what it is and what was expected.
    """
    high = Checkpoint([part.path for part in model.high_noise])
    low = Checkpoint([part.path for part in model.low_noise])
    if high.config != low.config:
        raise ValueError(
            f"the experts do not belong together: {high.label} is {high.config}, {low.label} is {low.config}"
        )
    vae = model.vae[0].path
    z_dim = check_vae_file(vae).z_dim
    if z_dim is not None and z_dim != high.config.out_dim:
        raise ValueError(f"{vae} decodes {z_dim} channels; the transformer makes {high.config.out_dim}")
    if model.text_encoder:
        encoder = [part.path for part in model.text_encoder]
        dim = check_text_encoder_files(encoder, [part.path for part in model.tokenizer]).dim
        if dim is not None and dim != high.config.text_dim:
            raise ValueError(f"{encoder[0]} makes rows of {dim} channels; the transformer takes {high.config.text_dim}")
    return high.config


def check_job(job: Job, context: Shape | None, context_null: Shape | None) -> tuple[str, ...]:
    """Everything that can be known to be wrong without running.

    Args:
        context: shape of the prompt's embeddings [n, text_dim], None where the job encodes its prompt.
        context_null: the same for the negative prompt.
    Returns:
        warnings for the status.
    Raises:
        ValueError: naming the field or the file, its value and what is allowed.
    """
    sampling, parallel, model = job.sampling, job.parallel, job.model
    check_size("width", sampling.width)
    check_size("height", sampling.height)
    config = check_model(model)
    _check_embeddings(job, config, context, context_null)
    warnings = []
    if model.high_noise == model.low_noise:
        warnings.append(f"both experts are the same file, {model.high_noise[0].path}")
    if parallel.gpu_count == 1:
        for name in ("use_fsdp", "master_port"):
            if getattr(parallel, name):
                warnings.append(f"{name} has no effect on one GPU")
    elif parallel.use_ulysses:
        warnings += _check_engine(job, config.num_heads)
    return tuple(warnings)


def _check_engine(job: Job, heads: int) -> list[str]:
    parallel = job.parallel
    if parallel.ulysses_engine == "deepspeed":
        if heads % parallel.gpu_count:
            divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"ulysses_engine is 'deepspeed' and gpu_count is {parallel.gpu_count}, which does not divide the "
                f"model's {heads} heads. Choose gpu_count {', '.join(divisors)}, or ulysses_engine 'packed'"
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("ulysses_engine is 'deepspeed', which is not installed; choose 'packed' or install it")
    if heads % parallel.gpu_count:
        most, least = -(-heads // parallel.gpu_count), heads // parallel.gpu_count
        return [
            f"{heads} heads do not divide by {parallel.gpu_count} GPUs: some compute {most}, some {least}; "
            "attention runs at the pace of the fullest"
        ]
    return []


def _check_embeddings(job: Job, config: WanConfig, context: Shape | None, context_null: Shape | None) -> None:
    if job.text is not None:
        return
    if context is None:
        raise ValueError("the job has neither a prompt to encode nor embeddings")
    if context_null is None and needs_negative(job.sampling):
        raise ValueError(
            f"guidance is {job.sampling.guidance_low} (low) and {job.sampling.guidance_high} (high), which needs "
            "negative embeddings; connect them, or set both to 1"
        )
    for name, shape in (("text_embeds", context), ("negative_embeds", context_null)):
        if shape is None:
            continue
        if len(shape) != 2 or not 1 <= shape[0] <= TEXT_LEN or shape[1] != config.text_dim:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; it must be [1 to {TEXT_LEN}, {config.text_dim}] for this transformer"
            )
