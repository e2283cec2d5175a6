"""Images that a video starts or ends with, in every form that other nodes hand on -> the tensors of a job.

IMAGE [B, H, W, C] in 0 to 1. Core CONDITIONING (WanImageToVideo, WanFirstLastFrameToVideo) holds concat_latent_image
[1, 16, T, h, w], un-normalised, and concat_mask [1, 1 or 4, T, h, w], 0 where known. WANVIDIMAGE_EMBEDS of
ComfyUI-WanVideoWrapper holds image_embeds, normalised, and mask, 1 where known: the other way round in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.control_inputs import CAMERA
from ...distributed.job.errors import check, listed
from ...wan.model.latent_space import TEMPORAL_STRIDE, WAN21, LatentSpace
from ...wan.model.variants import MASK, Variant, takers
from ..host.declared import is_set, kind_of
from ..host.entry_keys import PICTURE, PICTURE_MASK, PICTURE_MASK_INDEX
from ..host.status import Status
from ..host.tensors import tensor_of
from .control_embeds import KEY as CONTROL_EMBEDS
from .control_embeds import control_conditioning, has_control
from .embeds import extras_of
from .latent_input import check_video_size
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...distributed.job.job import Sampling
    from ...wan.model.config import WanConfig

CHANNELS, STRIDE, MASK_CHANNELS = WAN21.channels, WAN21.stride, TEMPORAL_STRIDE
"""Of the latents that I2V models take, and pixels per latent row and column."""
EMBEDS_KEYS = frozenset(
    {
        *("image_embeds", "mask", "clip_context", "negative_clip_context", "max_seq_len", "num_frames", "lat_h"),
        *("lat_w", "end_image", "fun_or_fl2v_model", "target_shape", "extra_latents", CONTROL_EMBEDS),
    }
)
"""What this pack understands of WANVIDIMAGE_EMBEDS; every other key asks for a model that it does not run."""

VACE_EMBEDS = frozenset(
    {
        *("vace_context", "vace_scale", "vace_start_percent", "vace_end_percent", "vace_seq_len", "has_ref"),
        "additional_vace_inputs",
    }
)
"""Those of a VACE control, which vace_inputs.py reads."""


def image_tensors(asked: VideoInputs, sampling: Sampling, config: WanConfig, status: Status) -> dict[str, Tensor]:
    """What the node's image inputs and the conditioning hold, by the names that a job knows.

    Raises:
        ValueError: in the user's words, if an image cannot be used or comes twice.
    """
    from ...wan.sampling.picture import fit_image

    found = {}
    for name in ("start_image", "end_image"):
        if (value := getattr(asked, name)) is not None:
            picture = _picture(value, name, sampling, status)
            found[name] = fit_image(picture, sampling.width, sampling.height, config.variant)
    conditioning = _from_texts(asked, sampling, config.variant, status)
    if asked.image_embeds is not None:
        if conditioning is not None:
            raise ValueError("an image comes twice: with image_embeds and with text_embeds; take one of them out")
        found |= _from_embeds(asked.image_embeds, sampling, config)
    return found if conditioning is None else {**found, "image_conditioning": conditioning}


def _picture(value: Any, name: str, sampling: Sampling, status: Status) -> Tensor:
    """[H, W, 3] of an IMAGE."""
    allowed = "an IMAGE [1, H, W, 3]"
    value = tensor_of(value, name, allowed)
    if value.ndim != 4 or value.shape[-1] not in (3, 4) or 0 in value.shape:
        raise ValueError(f"{name} is {list(value.shape)}; it must be {allowed}")
    count, rows, cols, channels = value.shape
    if count > 1:
        status.warn(f"{name} holds {count} images; the first one is used")
    if channels == 4:
        status.warn(f"{name} has an alpha channel, which is not used")
    if (cols, rows) != (sampling.width, sampling.height):
        size = f"{sampling.width}x{sampling.height}"
        if cols * sampling.height == rows * sampling.width:
            status.note(f"{name} is {cols}x{rows}; it was scaled to {size}")
        else:
            status.warn(f"{name} is {cols}x{rows}; it was scaled to cover {size} and cut to it")
    return value[0, :, :, :3]


def _from_texts(asked: VideoInputs, sampling: Sampling, variant: Variant, status: Status) -> Tensor | None:
    """The image that comes with the prompt; a negative prompt from the same node carries it as well."""
    positive, negative = (extras_of(getattr(asked, name), name) for name in ("text_embeds", "negative_embeds"))
    latents, mask = (positive.get(key) for key in (PICTURE, PICTURE_MASK))
    if negative.get(PICTURE) is not None and negative[PICTURE] is not latents:
        if latents is None:
            raise ValueError(
                "negative_embeds carries an image and text_embeds does not; "
                "connect both outputs of the node that adds it"
            )
        status.warn("negative_embeds carries another image than text_embeds; that of text_embeds is used")
    if latents is None and mask is None:
        return None
    return _from_core(latents, mask, positive.get(PICTURE_MASK_INDEX, 0), sampling, variant)


def _from_core(latents: Any, mask: Any, index: Any, sampling: Sampling, variant: Variant) -> Tensor:
    """The channels behind the latents [n, T, h, w]: normalised latents, and a mask where the variant's row has it.

    index: channels in front of the mask.
    """
    import torch

    from ...wan.vae.latents import normalise

    masked = MASK in variant.image or not variant.image
    if latents is None or (masked and mask is None):
        here, missing = (PICTURE_MASK, PICTURE)[:: 1 if latents is None else -1]
        raise ValueError(
            f"text_embeds carries {here} without {missing}; both are needed, as {_maker(variant)} adds them"
        )
    name = f"{PICTURE} of text_embeds"
    # One without a place for it is refused later, with what it takes.
    space = variant.latents if variant.image else WAN21
    channels = space.channels * max(variant.image_latents, 1)
    latents = tensor_of(latents, name, f"a tensor [1, {channels}, T, h, w]")
    if latents.ndim != 5 or tuple(latents.shape[:2]) != (1, channels) or 0 in latents.shape:
        raise ValueError(
            f"{name} has shape {list(latents.shape)}; Wan {variant.name} takes [1, {channels}, T, h, w]"
            if variant.image_latents > 1
            else f"{name} has shape {list(latents.shape)}; Wan I2V takes [1, {channels}, T, h, w]"
        )
    size = tuple(latents.shape[2:])
    _check_size(name, size, space, sampling, variant)
    parts = [normalise(part, space.channels) for part in latents[0].split(space.channels)]
    if not masked:
        return torch.cat(parts).contiguous()
    check(
        index == variant.mask_index, f"{PICTURE_MASK_INDEX} of text_embeds", index,
        f"{variant.mask_index} for {variant.name}, as {_maker(variant)} has it",
    )  # fmt: skip
    mask = tensor_of(mask, f"{PICTURE_MASK} of text_embeds", f"a tensor {[1, MASK_CHANNELS, *size]}", mask=True)
    if mask.ndim != 5 or mask.shape[0] != 1 or mask.shape[1] not in (1, MASK_CHANNELS) or tuple(mask.shape[2:]) != size:
        raise ValueError(
            f"{PICTURE_MASK} of text_embeds has shape {list(mask.shape)}; "
            f"it must be {[1, 1, *size]} or {[1, MASK_CHANNELS, *size]}"
        )
    known = 1 - mask[0].float().expand(MASK_CHANNELS, *size)
    parts.insert(variant.mask_index // space.channels, known)
    return torch.cat(parts).contiguous()


def _check_size(name: str, size: tuple[int, ...], space: LatentSpace, sampling: Sampling, variant: Variant) -> None:
    """Raises ValueError unless latents [T, h, w] = `size`, those in front among them, are of the node's video."""
    try:
        check_video_size(name, (size[0] - variant.frames_in_front, *size[1:]), space.stride, sampling)
    except ValueError as error:
        frames = space.shape(sampling.width, sampling.height, sampling.num_frames)[1]
        if not variant.frames_in_front or size[0] <= frames + variant.frames_in_front:
            raise
        # Latents of more pictures in front look as those of a longer video do.
        raise ValueError(
            f"{error}: length of {_maker(variant)} and num_frames. Where they are, its reference_image holds more than "
            f"one picture; this model ({variant.name}) takes a single picture"
        ) from None


def _maker(variant: Variant) -> str:
    """The node of ComfyUI's that makes such conditioning."""
    if variant.frames_in_front:
        return "WanAnimateToVideo"
    if CAMERA in variant.takes:
        return "WanCameraImageToVideo"
    return "Wan22FunControlToVideo" if variant.image_latents > 1 else "WanImageToVideo"


def _from_embeds(value: Any, sampling: Sampling, config: WanConfig) -> dict[str, Tensor]:
    """image_conditioning of I2V embeds; samples and noise_mask of empty ones with a first frame; else nothing."""
    if not isinstance(value, dict):
        raise ValueError(f"image_embeds is {kind_of(value)}; it must be WANVIDIMAGE_EMBEDS")
    if value.get("end_image") is not None and not is_set(value.get("fun_or_fl2v_model")):
        raise ValueError(
            "image_embeds were made for an end image outside the video; "
            "turn on fun_or_fl2v_model in WanVideoImageToVideoEncode"
        )
    known = EMBEDS_KEYS | (VACE_EMBEDS if is_set(value.get("vace_context")) else frozenset())
    other = [key for key, held in value.items() if key not in known and held is not None and held is not False]
    if other:
        raise ValueError(
            f"image_embeds carries {listed(sorted(other, key=str))}, which this node does not support; "
            "it takes the embeds of WanVideoImageToVideoEncode, WanVideoVACEEncode, WanVideoControlEmbeds and, without "
            "other controls, WanVideoEmptyEmbeds"
        )
    if has_control(value):
        return control_conditioning(value, sampling, config)
    if value.get("image_embeds") is not None:
        return {"image_conditioning": _i2v_embeds(value, sampling)}
    shape = value.get("target_shape")
    if shape is None:
        raise ValueError("image_embeds holds neither image_embeds nor target_shape")
    whole = isinstance(shape, list | tuple) and all(isinstance(size, int) for size in shape)
    check(whole and len(shape) == 4, "target_shape of image_embeds", shape, "four sizes, C, T, h and w")
    check_video_size("image_embeds", shape[1:], STRIDE, sampling)
    if not is_set(value.get("extra_latents")):
        return {}
    return _known_frames(value["extra_latents"], sampling, config)


def _i2v_embeds(value: dict[str, Any], sampling: Sampling) -> Tensor:
    """[20, T, h, w]: mask, then normalised latents."""
    import torch

    parts = [
        tensor_of(value[key], f"{key} of image_embeds", "a tensor [C, T, h, w]", mask=key == "mask").float()
        for key in ("mask", "image_embeds")
        if value.get(key) is not None
    ]
    shapes = [tuple(part.shape) for part in parts]
    if [len(shape) for shape in shapes] != [4] * len(parts) or len({shape[1:] for shape in shapes}) != 1:
        raise ValueError(f"image_embeds hold tensors of the shapes {shapes}; they must be [C, T, h, w] of one size")
    together = torch.cat(parts)
    if together.shape[0] != MASK_CHANNELS + CHANNELS:
        raise ValueError(
            f"image_embeds and their mask have {together.shape[0]} channels; they must have {MASK_CHANNELS + CHANNELS}"
        )
    check_video_size("image_embeds", together.shape[1:], STRIDE, sampling)
    return together.contiguous()


def _known_frames(extra_latents: Any, sampling: Sampling, config: WanConfig) -> dict[str, Tensor]:
    """Latent frames that a TI2V-5B video holds from the start, [1, 48, n, h, w] each, normalised."""
    import torch

    from ...wan.vae.latents import denormalise

    if "noise_mask" not in config.variant.takes:
        raise ValueError(f"image_embeds carries extra_latents, which only {takers('noise_mask')} models follow")
    shape = config.variant.latents.shape(sampling.width, sampling.height, sampling.num_frames)
    if not isinstance(extra_latents, list) or len(extra_latents) > shape[1]:
        found = f"{len(extra_latents)} entries" if isinstance(extra_latents, list) else kind_of(extra_latents)
        raise ValueError(
            f"extra_latents of image_embeds are {found}; they must be a list of at most {shape[1]}, the latent frames"
        )
    samples, mask = torch.zeros(shape), torch.ones(shape[1:])
    for entry in extra_latents:
        frames, index = _given_frames(entry)
        expected = (1, shape[0], frames.shape[2] if frames.ndim == 5 else 1, *shape[2:])
        if tuple(frames.shape) != expected or not 1 <= frames.shape[2] <= shape[1]:
            raise ValueError(
                f"extra_latents of image_embeds have the shape {list(frames.shape)}; it must be "
                f"[1, {shape[0]}, at most {shape[1]}, {shape[2]}, {shape[3]}]"
            )
        # Counted from the end where negative; moved so that all frames are inside.
        count = frames.shape[2]
        first = max(0, min(index + shape[1] if index < 0 else index, shape[1] - count))
        samples[:, first : first + count] = frames[0]
        mask[first : first + count] = 0
    return {"samples": denormalise(samples, shape[0]), "noise_mask": mask}


def _given_frames(entry: Any) -> tuple[Tensor, int]:
    """The latents of one of extra_latents, and the latent frame at which they are."""
    name = "an entry of extra_latents of image_embeds"
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {kind_of(entry)}; it must be an object with samples and index")
    index = entry.get("index")
    check(isinstance(index, int) and not isinstance(index, bool), f"index of {name}", index, "a whole number")
    assert isinstance(index, int), index
    return tensor_of(entry.get("samples"), f"samples of {name}", "a tensor [1, C, T, h, w]"), index
