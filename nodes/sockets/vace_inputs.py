"""What a VACE model follows, in every form that comes in -> the tensors of a job.

Own inputs are pixels: IMAGE [F, H, W, C], MASK [F, H, W] (1: made anew). Core CONDITIONING of WanVaceToVideo holds
vace_frames, a list of [1, 32, R + T, h, w], un-normalised, vace_mask [1, 64, R + T, h, w] and vace_strength, one entry
for each such node in a chain. WANVIDIMAGE_EMBEDS of ComfyUI-WanVideoWrapper's WanVideoVACEEncode holds vace_context, a
list of one [96, R + T, h, w], normalised, and what came before it in additional_vace_inputs. R: reference frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...distributed.job.control_inputs import MAX_CONTROL_STRENGTH, reference_frames
from ...distributed.job.errors import check
from ...wan.model.latent_space import TEMPORAL_STRIDE, WAN21
from ..host.declared import is_set, kind_of, number
from ..host.entry_keys import VACE_FRAMES, VACE_KEYS, VACE_MASKS, VACE_STRENGTHS
from ..host.status import Status
from ..host.tensors import tensor_of
from .embeds import extras_of
from .latent_input import check_video_size
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...distributed.job.job import Sampling
    from ...wan.model.config import WanConfig

OWN = ("control_video", "control_mask", "reference_images")
CONTEXT, SCALE, MORE = "vace_context", "vace_scale", "additional_vace_inputs"
"""Of WANVIDIMAGE_EMBEDS."""
NO_PICTURE = 1e-3
"""Normalised latents below are zeros that were converted to and fro."""


def carried_control(asked: VideoInputs) -> dict[str, Tensor]:
    """`vace_context` [n, 96, R + T, h, w] and `vace_strength` [n] of text_embeds or image_embeds, if they hold any.

    Raises:
        ValueError: in the user's words, if they cannot be used or come twice.
    """
    import torch

    found = list(_from_texts(asked))
    if isinstance(asked.image_embeds, dict) and is_set(asked.image_embeds.get(CONTEXT)):
        if found:
            raise ValueError("a VACE control comes twice: with image_embeds and with text_embeds; take one of them out")
        found = list(_from_embeds(asked.image_embeds))
    if not found:
        return {}
    if own := [name for name in OWN if getattr(asked, name) is not None]:
        raise ValueError(
            f"a VACE control comes twice: with {own[0]} and with other nodes' embeds; take one of them out"
        )
    contexts, strengths = zip(*found, strict=True)
    if len({context.shape for context in contexts}) > 1:
        raise ValueError(
            f"the VACE controls have the shapes {[list(context.shape) for context in contexts]}; they must have one "
            "size, and as many reference images each"
        )
    return {"vace_context": torch.stack(contexts).float().contiguous(), "vace_strength": torch.tensor(strengths)}


def check_length(control: dict[str, Tensor], sampling: Sampling, config: WanConfig) -> None:
    """Raises ValueError if a carried control is of another video. What is more would be taken for references."""
    if not control:
        return
    latents = config.variant.latents
    frames = latents.shape(sampling.width, sampling.height, sampling.num_frames)[1]
    context = control["vace_context"]
    more = context.shape[2] - frames
    size = min(context.shape[2], frames), *context.shape[3:]
    check_video_size("the VACE control of text_embeds or image_embeds", size, latents.stride, sampling)
    if more <= 0:
        return
    # A reference has no mask, and zeros as latents of what is made anew; a frame has at least grey there.
    zeros = context[:, WAN21.channels :, :more].abs().amax(dim=(0, 1, 3, 4)) < NO_PICTURE
    if not zeros.all():
        whole = TEMPORAL_STRIDE * (context.shape[2] - int(zeros.sum()) - 1) + 1
        raise ValueError(
            f"the VACE control of text_embeds or image_embeds is of {whole} frames, and num_frames is "
            f"{sampling.num_frames}; make them equal"
        )


def own_control(asked: VideoInputs, sampling: Sampling, config: WanConfig, status: Status) -> dict[str, Tensor]:
    """`control_video`, `control_mask`, `reference_images` and `vace_strength`, as far as the node's inputs go."""
    import torch

    from ...wan.sampling.control import GREY
    from ...wan.sampling.picture import fit_image, fit_mask

    found = {}
    size = sampling.width, sampling.height
    if asked.control_video is not None:
        frames = _frames(asked.control_video, "control_video", sampling, status)
        followed = sampling.num_frames
        if not config.variant.controlled:
            # There is no mask to say where no frame is: the video is as long as what there is to follow.
            followed = (len(frames) - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
            frames = frames[:followed]
        video = torch.full((3, followed, sampling.height, sampling.width), GREY)
        for i, frame in enumerate(frames):
            video[:, i] = fit_image(frame[..., :3], *size, config.variant)
        found["control_video"] = video
    if asked.control_mask is not None:
        if asked.control_video is None:
            raise ValueError("control_mask is connected but control_video is not; connect both, or neither")
        masks = _frames(asked.control_mask, "control_mask", sampling, status)
        mask = torch.ones(sampling.num_frames, sampling.height, sampling.width)
        count = sampling.num_frames if len(masks) == 1 else len(masks)
        mask[:count] = fit_mask(masks, *size)
        # There is nothing to keep where there is no frame.
        mask[len(frames) :] = 1
        found["control_mask"] = mask
        if count < sampling.num_frames:
            status.note(f"control_mask has {count} frames; those behind are made anew")
    if asked.control_video is not None and len(frames) < sampling.num_frames:
        status.note(f"control_video has {len(frames)} frames; those behind are made without one")
    if asked.reference_images is not None:
        pictures = _images(asked.reference_images, "reference_images", 4, "an IMAGE [n, H, W, 3]")
        found["reference_images"] = torch.stack([fit_image(one[..., :3], *size, config.variant) for one in pictures])
        if not config.variant.controlled and len(pictures) > 1:
            raise ValueError(
                f"reference_images holds {len(pictures)} images; this model ({config.variant.name}) takes one"
            )
    if config.variant.controlled:
        found["vace_strength"] = torch.tensor([asked.vace_strength])
    return found


def control_size(
    asked: VideoInputs, carried: dict[str, Tensor], sampling: Sampling, config: WanConfig
) -> tuple[int, int]:
    """Controls that the model follows, and latent frames of reference pictures, before any picture is looked at."""
    if not config.variant.controlled:
        return 0, config.variant.frames_in_front
    frames = config.variant.latents.shape(sampling.width, sampling.height, sampling.num_frames)[1]
    shapes = {name: tuple(tensor.shape) for name, tensor in carried.items()}
    if asked.reference_images is not None:
        pictures = _images(asked.reference_images, "reference_images", 4, "an IMAGE [n, H, W, 3]")
        shapes["reference_images"] = tuple(pictures.shape)
    return shapes.get("vace_context", (1,))[0], reference_frames(config.variant, shapes, frames)


def _images(value: Any, name: str, dimensions: int, allowed: str) -> Tensor:
    value = tensor_of(value, name, allowed, mask=dimensions == 3)
    if value.ndim != dimensions or 0 in value.shape or (dimensions == 4 and value.shape[-1] not in (3, 4)):
        raise ValueError(f"{name} is {list(value.shape)}; it must be {allowed}")
    return value.float()


def _frames(value: Any, name: str, sampling: Sampling, status: Status) -> Tensor:
    """At most the video's frames of an IMAGE or a MASK; one mask is that of all frames."""
    mask = name == "control_mask"
    frames = _images(value, name, 3 if mask else 4, "a MASK [F, H, W]" if mask else "an IMAGE [F, H, W, 3]")
    if len(frames) > sampling.num_frames:
        status.note(f"{name} has {len(frames)} frames; the first {sampling.num_frames} are used")
    return frames[: sampling.num_frames]


def _from_texts(asked: VideoInputs) -> Iterator[tuple[Tensor, float]]:
    """(control [96, R + T, h, w], strength) of each WanVaceToVideo."""
    import torch

    positive, negative = (_core(getattr(asked, name), name) for name in ("text_embeds", "negative_embeds"))
    if asked.negative_embeds is not None and not isinstance(asked.negative_embeds, dict):
        same = len(positive) == len(negative) and all(
            one[1] == other[1] and (one[0] is other[0] or torch.equal(one[0], other[0]))
            for one, other in zip(positive, negative, strict=True)
        )
        if not same:
            raise ValueError(
                "negative_embeds carries another VACE control than text_embeds; connect both outputs of WanVaceToVideo"
            )
    yield from positive


def _core(value: Any, name: str) -> list[tuple[Tensor, float]]:
    import torch

    from ...wan.vae.latents import normalise

    extras = extras_of(value, name)
    if all(extras.get(key) is None for key in VACE_KEYS):
        return []
    lists: dict[str, list[Any]] = {}
    for key in VACE_KEYS:
        held = extras.get(key)
        if not isinstance(held, list) or not held:
            raise ValueError(f"{key} of {name} is {kind_of(held)}; it must be a list, as WanVaceToVideo makes it")
        lists[key] = held
    if len({len(held) for held in lists.values()}) > 1:
        raise ValueError(f"{', '.join(VACE_KEYS)} of {name} are lists of different lengths")
    found = []
    for frames, mask, strength in zip(lists[VACE_FRAMES], lists[VACE_MASKS], lists[VACE_STRENGTHS], strict=True):
        latents = _latents(frames, f"{VACE_FRAMES} of {name}", 2 * WAN21.channels)
        masks = _latents(mask, f"{VACE_MASKS} of {name}", WAN21.stride**2, mask=True)
        if latents.shape[1:] != masks.shape[1:]:
            raise ValueError(
                f"{VACE_FRAMES} and {VACE_MASKS} of {name} are of {list(latents.shape[1:])} and "
                f"{list(masks.shape[1:])}; they must be of one size"
            )
        parts = [normalise(part, WAN21.channels) for part in latents.split(WAN21.channels)]
        found.append(
            (
                torch.cat([*parts, masks]),
                number(f"{VACE_STRENGTHS} of {name}", strength, -MAX_CONTROL_STRENGTH, MAX_CONTROL_STRENGTH),
            )
        )
    return found


def _latents(value: Any, name: str, channels: int, *, mask: bool = False) -> Tensor:
    """[channels, T, h, w] of [1, channels, T, h, w]."""
    tensor = tensor_of(value, name, f"a tensor [1, {channels}, T, h, w]", mask=mask)
    if tensor.ndim != 5 or tuple(tensor.shape[:2]) != (1, channels) or 0 in tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [1, {channels}, T, h, w]")
    return tensor[0]


def _from_embeds(embeds: dict[str, Any]) -> Iterator[tuple[Tensor, float]]:
    name = f"{CONTEXT} of image_embeds"
    held = embeds.get(CONTEXT)
    if isinstance(held, list | tuple) and len(held) == 1:
        held = held[0]
    context = tensor_of(held, name, "a list of one tensor [96, T, h, w]")
    channels = 2 * WAN21.channels + WAN21.stride**2
    if context.ndim != 4 or context.shape[0] != channels or 0 in context.shape:
        raise ValueError(f"{name} has shape {list(context.shape)}; it must be [{channels}, T, h, w]")
    for key, neutral in (("vace_start_percent", 0.0), ("vace_end_percent", 1.0)):
        percent = embeds.get(key, neutral)
        check(
            percent == neutral, f"{key} of image_embeds", percent, f"{neutral:g}: every step follows the control here"
        )
    strength = embeds.get(SCALE, 1.0)
    if isinstance(strength, list) and strength and all(value == strength[0] for value in strength):
        strength = strength[0]
    yield context, number(f"{SCALE} of image_embeds", strength, -MAX_CONTROL_STRENGTH, MAX_CONTROL_STRENGTH)
    more = embeds.get(MORE)
    if is_set(more):
        if not isinstance(more, list) or not all(isinstance(one, dict) and CONTEXT in one for one in more):
            raise ValueError(
                f"{MORE} of image_embeds is {kind_of(more)}; it must be a list of WanVideoVACEEncode's embeds"
            )
        for one in more:
            yield from _from_embeds({**one, MORE: None})
