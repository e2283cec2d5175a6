"""The tensors that travel with a job, in inputs.safetensors: their names, their shapes, and what fits which model."""

from __future__ import annotations

from collections.abc import Mapping

from ...wan.model.config import CLIP_PICTURE, PICTURE_ROWS, TEXT_LEN, WanConfig
from ...wan.model.variants import takers
from .control_inputs import CAMERA, CONTROL_VIDEO, check_controls, reference_frames
from .errors import check
from .job import Job

Shape = tuple[int, ...]

CONTEXT = "context"
"""The prompt's text tokens [n, text_dim]; absent where the job encodes its prompt."""
CONTEXT_NULL = "context_null"
"""The same of the negative prompt."""
START_IMAGE = "start_image"
"""First frame [3, height, width] in -1 to 1."""
END_IMAGE = "end_image"
"""Last frame, the same."""
IMAGE_CONDITIONING = "image_conditioning"
"""An I2V model's further input channels [4 + C, T, h, w]: mask (1: given), then normalised latents."""
CLIP_FEATURES = "clip_features"
"""CLIP's features of pictures for an image branch, [257 for each, clip_dim]: hidden states before its last block."""
CLIP_PICTURES = "clip_pictures"
"""In their place the pictures [1 or 2, 3, 224, 224], as CLIP takes them, for the job's own CLIP."""
PICTURES = (START_IMAGE, END_IMAGE, IMAGE_CONDITIONING)
SAMPLES = "samples"
"""Latents to start from [C, T, h, w], un-normalised, as ComfyUI's LATENT."""
MAX_PICTURES = 2
"""That CLIP features are of: the first frame and the last."""
NOISE_MASK = "noise_mask"
"""[T, h, w]: 1 where latents are made, 0 where `samples` stays; the 5B models only."""


def check_inputs(job: Job, config: WanConfig, shapes: Mapping[str, Shape]) -> None:
    """Raises ValueError naming the tensor that is missing, of another shape, or of no use to this model."""
    _check_text(job, config, shapes)
    _check_images(job, config, shapes)
    _check_features(job, config, shapes)
    check_controls(job.sampling, config, shapes, latents_shape(job, config, shapes))
    _check_samples(job, config, shapes)


def _check_text(job: Job, config: WanConfig, shapes: Mapping[str, Shape]) -> None:
    if job.text is not None:
        return
    if CONTEXT not in shapes:
        raise ValueError("the job has neither a prompt to encode nor embeddings")
    for name, words in ((CONTEXT, "text_embeds"), (CONTEXT_NULL, "negative_embeds")):
        shape = shapes.get(name)
        if shape is None:
            continue
        if len(shape) != 2 or not 1 <= shape[0] <= TEXT_LEN or shape[1] != config.text_dim:
            raise ValueError(
                f"{words} has shape {shape}; it must be [1 to {TEXT_LEN}, {config.text_dim}] for this transformer"
            )


def _check_images(job: Job, config: WanConfig, shapes: Mapping[str, Shape]) -> None:
    sampling = job.sampling
    given = [name for name in PICTURES if name in shapes]
    pictures = [name for name in given if name != IMAGE_CONDITIONING]
    variant = config.variant
    followed = CONTROL_VIDEO in shapes and CONTROL_VIDEO in variant.takes
    if variant.image_channels and not given and not followed and CAMERA not in shapes:
        begins = [name for name in (START_IMAGE, CONTROL_VIDEO, END_IMAGE) if name in variant.takes]
        raise ValueError(
            f"the model makes videos from an image ({variant.name}): connect "
            f"{', or '.join([', '.join(begins)] * bool(begins) + ['conditioning that holds one'])}"
        )
    for name in given:
        if not variant.takes:
            raise ValueError(
                f"{name} is given, but the model makes videos from text only ({variant.name}); choose an I2V model"
            )
        if name not in variant.takes:
            taken = ", ".join([picture for picture in variant.takes if picture in PICTURES] or variant.takes)
            raise ValueError(f"{name} is given; this model ({variant.name}) takes {taken} only")
    if pictures and IMAGE_CONDITIONING in shapes:
        raise ValueError(f"{pictures[0]} and image conditioning are both given; connect one of them")
    if followed and IMAGE_CONDITIONING in shapes:
        raise ValueError(f"{CONTROL_VIDEO} and image conditioning are both given; connect one of them")
    for name in pictures:
        _check_shape(name, shapes[name], (3, sampling.height, sampling.width))
    if IMAGE_CONDITIONING in shapes:
        expected = (config.in_dim - config.out_dim, *latents_shape(job, config, shapes)[1:])
        _check_shape("image conditioning", shapes[IMAGE_CONDITIONING], expected)


def _check_features(job: Job, config: WanConfig, shapes: Mapping[str, Shape]) -> None:
    variant, given = config.variant, [name for name in (CLIP_FEATURES, CLIP_PICTURES) if name in shapes]
    if not given:
        if config.image_branch:
            # The job's own CLIP sees what comes as pixels.
            chosen = "choose clip_vision_h as clip_vision in Load Wan Video Model, or "
            raise ValueError(
                f"the model looks at its pictures through CLIP ({variant.name}): "
                f"{chosen if START_IMAGE in variant.takes else ''}connect CLIP Vision Encode to clip_vision_start_image"
            )
        return
    if CLIP_FEATURES not in variant.takes:
        raise ValueError(
            f"CLIP vision features are given; this model ({variant.name}) has no image branch, as "
            f"{takers(CLIP_FEATURES)} has"
        )
    if len(given) > 1:
        raise ValueError(f"{CLIP_FEATURES} and {CLIP_PICTURES} are both given; take one out")
    shape, counts = list(shapes[given[0]]), range(1, MAX_PICTURES + 1)
    if CLIP_PICTURES in shapes:
        check(job.looks, "model.clip_vision", (), f"given when {CLIP_PICTURES} are")
        allowed = [[count, *CLIP_PICTURE] for count in counts]
        if shape not in allowed:
            raise ValueError(f"{CLIP_PICTURES} has shape {shape}; it must be {' or '.join(map(str, allowed))}")
        return
    allowed = [[PICTURE_ROWS * count, config.clip_dim] for count in counts]
    if shape not in allowed:
        raise ValueError(
            f"the CLIP vision features have shape {shape}; this model takes {' or '.join(map(str, allowed))}, as "
            "clip_vision_h makes them"
        )


def latents_shape(job: Job, config: WanConfig, shapes: Mapping[str, Shape]) -> tuple[int, int, int, int]:
    """[C, T, h, w] of what is sampled: the video, behind its reference frames."""
    sampling = job.sampling
    channels, frames, rows, cols = config.variant.latents.shape(sampling.width, sampling.height, sampling.num_frames)
    return channels, frames + reference_frames(config.variant, shapes, frames), rows, cols


def _check_samples(job: Job, config: WanConfig, shapes: Mapping[str, Shape]) -> None:
    sampling = job.sampling
    if SAMPLES not in shapes:
        wrong = {
            "strength": sampling.strength < 1,
            "start_step": sampling.start_step > 0,
            "add_noise": not sampling.add_noise,
            NOISE_MASK: NOISE_MASK in shapes,
        }
        for name in (name for name, is_set in wrong.items() if is_set):
            raise ValueError(
                f"{name} is {getattr(sampling, name, 'given')}, but no latents to start from; connect samples"
            )
        return
    _check_shape("samples", shapes[SAMPLES], latents_shape(job, config, shapes))
    if NOISE_MASK in shapes:
        if NOISE_MASK not in config.variant.takes:
            raise ValueError(
                f"samples have a noise mask, which only {takers(NOISE_MASK)} models follow; remove the mask"
            )
        if START_IMAGE in shapes:
            raise ValueError("samples with a noise mask and start_image are both given; connect one of them")
        _check_shape("the noise mask", shapes[NOISE_MASK], latents_shape(job, config, shapes)[1:])


def _check_shape(name: str, shape: Shape, expected: Shape) -> None:
    if tuple(shape) != expected:
        raise ValueError(
            f"{name} has shape {list(shape)}; width, height, num_frames and the model call for {list(expected)}"
        )
