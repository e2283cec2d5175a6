"""The tensors of a job that a VACE model reads beside the noise: their names, their shapes, what they add."""

from __future__ import annotations

from collections.abc import Mapping

from ...wan.model.config import WanConfig
from ...wan.model.variants import takers
from .job import Sampling

Shape = tuple[int, ...]

CONTROL_VIDEO = "control_video"
"""What the video follows, [3, num_frames, height, width] in -1 to 1."""
CONTROL_MASK = "control_mask"
"""[num_frames, height, width]: 1 where the video is made anew, 0 where `control_video` is kept."""
REFERENCE_IMAGES = "reference_images"
"""[n, 3, height, width] in -1 to 1. Each takes a latent frame in front of the video's."""
VACE_CONTEXT = "vace_context"
"""In their place, n controls as the model takes them: [n, 96, references + T, h, w], normalised latents and mask."""
VACE_STRENGTH = "vace_strength"
"""[n], of each control."""
CONTROLS = (CONTROL_VIDEO, CONTROL_MASK, REFERENCE_IMAGES, VACE_CONTEXT, VACE_STRENGTH)


def reference_frames(shapes: Mapping[str, Shape], frames: int) -> int:
    """Latent frames in front of the video's `frames`; they are cut off before it is decoded."""
    if len(context := shapes.get(VACE_CONTEXT, ())) == 5:
        return max(context[2] - frames, 0)
    return shapes.get(REFERENCE_IMAGES, (0,))[0]


def check_controls(sampling: Sampling, config: WanConfig, shapes: Mapping[str, Shape], latents: Shape) -> None:
    """As `input_tensors.check_inputs`. latents: [C, T, h, w] of what is sampled."""
    variant, given = config.variant, [name for name in CONTROLS if name in shapes]
    for name in given:
        if name not in variant.takes:
            raise ValueError(
                f"{name} is given, but this model ({variant.name}) follows no control; choose a {takers(name)} model"
            )
    frame, count = (sampling.height, sampling.width), 1
    if VACE_CONTEXT in shapes:
        if other := [name for name in given if name not in (VACE_CONTEXT, VACE_STRENGTH)]:
            raise ValueError(
                f"{other[0]} and another control, of text_embeds or image_embeds, are both given; take one out"
            )
        count = shapes[VACE_CONTEXT][0] if shapes[VACE_CONTEXT] else 0
    for name, expected in (
        (CONTROL_VIDEO, (3, sampling.num_frames, *frame)),
        (CONTROL_MASK, (sampling.num_frames, *frame)),
        (REFERENCE_IMAGES, (max(reference_frames(shapes, latents[1]), 1), 3, *frame)),
        (VACE_CONTEXT, (max(count, 1), config.control_dim, *latents[1:])),
        (VACE_STRENGTH, (max(count, 1),)),
    ):
        if name in shapes and tuple(shapes[name]) != expected:
            raise ValueError(
                f"{name} has shape {list(shapes[name])}; width, height, num_frames and the model call for "
                f"{list(expected)}"
            )
