"""What an Animate model takes over of a video, as core CONDITIONING of WanAnimateToVideo carries it.

pose_video_latent [1, 16, P, h, w], un-normalised; face_video_pixels [1, 3, F, 512, 512] in -1 to 1, another one with
the negative prompt. What it shows and what is around it comes as with an I2V model (images.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.errors import listed
from ...wan.sampling.told import KINDS
from ..host.tensors import tensor_of
from .embeds import extras_of
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...wan.model.config import WanConfig

POSE, FACE = KINDS["pose"], KINDS["face"]
POSES, FACES = POSE.entry, FACE.entry


def animate_tensors(asked: VideoInputs, config: WanConfig) -> dict[str, Tensor]:
    """`pose_video_latent` [16, P, h, w], normalised, `face_video_pixels` and `face_video_pixels_null` [3, F, 512, 512].

    Raises:
        ValueError: in the user's words, if they cannot be used.
    """
    import torch

    from ...wan.vae.latents import normalise

    positive, negative = (_carried(getattr(asked, name), name, config) for name in ("text_embeds", "negative_embeds"))
    one_alone = asked.negative_embeds is not None and not isinstance(asked.negative_embeds, dict)
    if positive.keys() != negative.keys() and (one_alone or not positive.keys() >= negative.keys()):
        raise _two_of_them()
    if {POSES} <= positive.keys() & negative.keys() and not torch.equal(positive[POSES], negative[POSES]):
        raise _two_of_them()
    found = {}
    if POSES in positive:
        found[POSE.tensors[0]] = normalise(positive[POSES], config.out_dim).contiguous()
    for name, told in zip(FACE.tensors, (positive, negative), strict=True):
        if FACES in told:
            found[name] = told[FACES].contiguous()
    return found


def _two_of_them() -> ValueError:
    return ValueError(
        "negative_embeds carries another pose or face than text_embeds; connect both outputs of WanAnimateToVideo"
    )


def _carried(value: Any, name: str, config: WanConfig) -> dict[str, Tensor]:
    extras, found = extras_of(value, name), {}
    for kind in (POSE, FACE):
        if extras.get(kind.entry) is None:
            continue
        channels = kind.channels(config)
        allowed = f"a tensor [{listed((1, channels, *kind.sides))}]"
        tensor = tensor_of(extras[kind.entry], f"{kind.entry} of {name}", allowed)
        if tensor.ndim != 5 or tuple(tensor.shape[:2]) != (1, channels) or 0 in tensor.shape:
            raise ValueError(f"{kind.entry} of {name} has shape {list(tensor.shape)}; it must be {allowed}")
        found[kind.entry] = tensor[0].float()
    return found
