"""What Fun models are told beside pictures and a control video, as core CONDITIONING carries it.

Wan22FunControlToVideo adds reference_latents, a list of [1, C, 1, h, w], un-normalised, of which the last counts: the
picture that a Fun-Control model has in front of the video. WanCameraImageToVideo adds camera_conditions
[1, 24, T, height, width], what WanCameraEmbedding gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.control_inputs import CAMERA, REFERENCE_LATENT
from ...wan.model.variants import takers
from ..host.declared import kind_of
from ..host.entry_keys import REFERENCES
from ..host.tensors import tensor_of
from .control_embeds import has_reference_embeds
from .embeds import extras_of
from .latent_input import check_video_size
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...distributed.job.job import Sampling
    from ...wan.model.config import WanConfig


TEXTS = ("text_embeds", "negative_embeds")


def has_reference(asked: VideoInputs, config: WanConfig) -> bool:
    """Whether the model computes a frame in front of the video, before any picture is looked at."""
    if REFERENCE_LATENT not in config.variant.takes:
        return False
    carried = extras_of(asked.text_embeds, "text_embeds").get(REFERENCES)
    return asked.reference_images is not None or bool(carried) or has_reference_embeds(asked.image_embeds)


def reference_tensors(asked: VideoInputs, config: WanConfig) -> dict[str, Tensor]:
    """`reference_latent` [C, h, w], normalised, if the conditioning holds it.

    Raises:
        ValueError: in the user's words, if it cannot be used.
    """
    import torch

    from ...wan.vae.latents import normalise

    positive, negative = (_last(getattr(asked, name), name, config) for name in TEXTS)
    if positive is None and negative is None:
        return {}
    if REFERENCE_LATENT not in config.variant.takes:
        raise ValueError(
            f"text_embeds carries {REFERENCES}, which this model ({config.variant.name}) does not take; choose a "
            f"{takers(REFERENCE_LATENT)} model, or take out the node that adds it"
        )
    if has_reference_embeds(asked.image_embeds):
        raise ValueError(
            "a reference picture comes twice: with image_embeds and with text_embeds; take one of them out"
        )
    one_alone = asked.negative_embeds is not None and not isinstance(asked.negative_embeds, dict)
    if positive is None or (one_alone and (negative is None or not torch.equal(positive, negative))):
        raise ValueError(
            "negative_embeds carries another reference picture than text_embeds; connect both outputs of "
            "Wan22FunControlToVideo"
        )
    return {REFERENCE_LATENT: normalise(positive, config.out_dim)[:, 0].contiguous()}


def camera_tensors(asked: VideoInputs, sampling: Sampling) -> dict[str, Tensor]:
    """`camera_conditions` [24, T, height, width], of the node's own input or of the conditioning.

    Raises:
        ValueError: in the user's words, if they cannot be used or come twice.
    """
    import torch

    positive, negative = (extras_of(getattr(asked, name), name).get(CAMERA) for name in TEXTS)
    given, name = asked.camera_conditions, CAMERA
    if given is not None and positive is not None:
        raise ValueError("camera_conditions come twice: with this node and with text_embeds; take one of them out")
    if given is None:
        given, name = positive, f"{CAMERA} of text_embeds"
        one_alone = asked.negative_embeds is not None and not isinstance(asked.negative_embeds, dict)
        same = negative is positive or (
            isinstance(positive, torch.Tensor)
            and isinstance(negative, torch.Tensor)
            and torch.equal(positive, negative)
        )
        if not same and (one_alone or positive is None):
            raise ValueError(
                "negative_embeds carries other camera_conditions than text_embeds; connect both outputs of "
                "WanCameraImageToVideo"
            )
    if given is None:
        return {}
    allowed = "what WanCameraEmbedding gives, a tensor [1, 24, T, height, width]"
    rays = tensor_of(given, name, allowed)
    if rays.ndim != 5 or rays.shape[0] != 1 or 0 in rays.shape:
        raise ValueError(f"{name} has shape {list(rays.shape)}; it must be {allowed}")
    check_video_size(name, rays.shape[2:], 1, sampling)
    return {CAMERA: rays[0].float().contiguous()}


def _last(value: Any, name: str, config: WanConfig) -> Tensor | None:
    """[C, 1, h, w]."""
    held = extras_of(value, name).get(REFERENCES)
    if held is None:
        return None
    if not isinstance(held, list) or not held:
        raise ValueError(f"{REFERENCES} of {name} is {kind_of(held)}; it must be a list of latents")
    channels = config.out_dim
    allowed = f"a tensor [1, {channels}, 1, h, w]"
    latents = tensor_of(held[-1], f"{REFERENCES} of {name}", allowed)
    if latents.ndim != 5 or tuple(latents.shape[:3]) != (1, channels, 1) or 0 in latents.shape:
        raise ValueError(f"{REFERENCES} of {name} has shape {list(latents.shape)}; it must be {allowed}")
    return latents[0]
