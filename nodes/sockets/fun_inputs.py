"""The reference picture that a Fun-Control model has in front of the video, as core CONDITIONING carries it.

Wan22FunControlToVideo adds reference_latents, a list of [1, C, 1, h, w], un-normalised, of which the last counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.control_inputs import REFERENCE_LATENT
from ...wan.model.variants import takers
from ..host.declared import kind_of
from ..host.tensors import tensor_of
from .control_embeds import has_reference_embeds
from .embeds import REFERENCE_KEY, extras_of
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...wan.model.config import WanConfig


def has_reference(asked: VideoInputs, config: WanConfig) -> bool:
    """Whether the model computes a frame in front of the video, before any picture is looked at."""
    if REFERENCE_LATENT not in config.variant.takes:
        return False
    carried = extras_of(asked.text_embeds, "text_embeds").get(REFERENCE_KEY)
    return asked.reference_images is not None or bool(carried) or has_reference_embeds(asked.image_embeds)


def reference_tensors(asked: VideoInputs, config: WanConfig) -> dict[str, Tensor]:
    """`reference_latent` [C, h, w], normalised, if the conditioning holds it.

    Raises:
        ValueError: in the user's words, if it cannot be used.
    """
    import torch

    from ...wan.vae.latents import normalise

    positive, negative = (_last(getattr(asked, name), name, config) for name in ("text_embeds", "negative_embeds"))
    if positive is None and negative is None:
        return {}
    if REFERENCE_LATENT not in config.variant.takes:
        raise ValueError(
            f"text_embeds carries {REFERENCE_KEY}, which this model ({config.variant.name}) does not take; choose a "
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


def _last(value: Any, name: str, config: WanConfig) -> Tensor | None:
    """[C, 1, h, w]."""
    held = extras_of(value, name).get(REFERENCE_KEY)
    if held is None:
        return None
    if not isinstance(held, list) or not held:
        raise ValueError(f"{REFERENCE_KEY} of {name} is {kind_of(held)}; it must be a list of latents")
    channels = config.out_dim
    allowed = f"a tensor [1, {channels}, 1, h, w]"
    latents = tensor_of(held[-1], f"{REFERENCE_KEY} of {name}", allowed)
    if latents.ndim != 5 or tuple(latents.shape[:3]) != (1, channels, 1) or 0 in latents.shape:
        raise ValueError(f"{REFERENCE_KEY} of {name} has shape {list(latents.shape)}; it must be {allowed}")
    return latents[0].float()
