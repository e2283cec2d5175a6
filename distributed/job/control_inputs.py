"""The tensors of a job that a VACE, Fun or Animate model reads beside the noise: names, shapes, what they add."""

from __future__ import annotations

from collections.abc import Mapping

from ...wan.model.config import WanConfig
from ...wan.model.latent_space import TEMPORAL_STRIDE
from ...wan.model.variants import Variant, takers
from ...wan.sampling.told import KINDS
from .job import Sampling

Shape = tuple[int, ...]

CONTROL_VIDEO = "control_video"
"""What the video follows, [3, num_frames, height, width] in -1 to 1."""
CONTROL_MASK = "control_mask"
"""[num_frames, height, width]: 1 where the video is made anew, 0 where `control_video` is kept."""
REFERENCE_IMAGES = "reference_images"
"""[n, 3, height, width] in -1 to 1. Each takes a latent frame in front of the video's; Fun-Control has one."""
REFERENCE_LATENT = "reference_latent"
"""In its place the picture's normalised latents [C, h, w], for Fun-Control."""
VACE_CONTEXT = "vace_context"
"""In their place, n controls as the model takes them: [n, 96, references + T, h, w], normalised latents and mask."""
VACE_STRENGTH = "vace_strength"
"""[n], of each control."""
MAX_CONTROL_STRENGTH = 1000.0
"""Either way, as in ComfyUI's node."""
(CAMERA,) = KINDS["camera"].tensors
TOLD = {name: kind for kind in KINDS.values() for name in kind.tensors}
"""Those that are as the model takes them: name -> kind."""
CONTROLS = (CONTROL_VIDEO, CONTROL_MASK, REFERENCE_IMAGES, VACE_CONTEXT, VACE_STRENGTH, REFERENCE_LATENT, *TOLD)


def reference_frames(variant: Variant, shapes: Mapping[str, Shape], frames: int) -> int:
    """Latent frames that are sampled in front of the video's `frames`; they are cut off before it is decoded."""
    if not variant.controlled:
        return variant.frames_in_front
    if len(context := shapes.get(VACE_CONTEXT, ())) == 5:
        return max(context[2] - frames, 0)
    return shapes.get(REFERENCE_IMAGES, (0,))[0]


def check_controls(sampling: Sampling, config: WanConfig, shapes: Mapping[str, Shape], latents: Shape) -> None:
    """As `input_tensors.check_inputs`. latents: [C, T, h, w] of what is sampled."""
    variant, given = config.variant, [name for name in CONTROLS if name in shapes]
    for name in given:
        if name not in variant.takes:
            raise ValueError(
                f"{name} is given, but this model ({variant.name}) follows no such control; choose one of these: "
                f"{takers(name)}"
            )
    if {REFERENCE_IMAGES, REFERENCE_LATENT} <= shapes.keys():
        raise ValueError("reference_images and a reference of text_embeds or image_embeds are both given; take one out")
    frame, count = (sampling.height, sampling.width), 1
    if VACE_CONTEXT in shapes:
        if other := [name for name in given if name not in (VACE_CONTEXT, VACE_STRENGTH)]:
            raise ValueError(
                f"{other[0]} and another control, of text_embeds or image_embeds, are both given; take one out"
            )
        count = shapes[VACE_CONTEXT][0] if shapes[VACE_CONTEXT] else 0
    space = variant.latents
    wanted: list[tuple[str, Shape]] = [
        (CONTROL_VIDEO, (3, _control_frames(sampling, variant, shapes), *frame)),
        (CONTROL_MASK, (sampling.num_frames, *frame)),
        (REFERENCE_IMAGES, (max(reference_frames(variant, shapes, latents[1]), 1), 3, *frame)),
        (REFERENCE_LATENT, (config.reference_dim, *latents[2:])),
        (VACE_CONTEXT, (max(count, 1), config.control_dim, *latents[1:])),
        (VACE_STRENGTH, (max(count, 1),)),
    ]
    for name, kind in TOLD.items():
        channels, *size = kind.shape(config, latents[1:])
        given_shape = tuple(shapes.get(name, ()))
        fits = kind.fits(given_shape, latents[1:], space.stride)
        wanted.append((name, (channels, *(given_shape[1:] if fits else size))))
    for name, expected in wanted:
        if name in shapes and tuple(shapes[name]) != expected:
            raise ValueError(
                f"{name} has shape {list(shapes[name])}; width, height, num_frames and the model call for "
                f"{list(expected)}"
            )


def _control_frames(sampling: Sampling, variant: Variant, shapes: Mapping[str, Shape]) -> int:
    """That the control video must have: all, or fewer where there is nothing to follow behind it."""
    given = shapes.get(CONTROL_VIDEO, (3, 0))
    whole = len(given) > 1 and given[1] % TEMPORAL_STRIDE == 1 and given[1] < sampling.num_frames
    return given[1] if whole and CONTROL_MASK not in variant.takes else sampling.num_frames
