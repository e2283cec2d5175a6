"""LATENT as other nodes hand it on -> the latents a job starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...wan.model.latent_space import LATENT_SPACES, TEMPORAL_STRIDE
from ..host.declared import is_set, kind_of
from ..host.status import Status
from ..host.tensors import tensor_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...distributed.job.job import Sampling
    from ...wan.model.config import WanConfig

WRAPPER_KEYS = frozenset(
    {
        *("looped", "end_image", "has_ref", "drop_last", "generator_state", "original_image", "cache_states"),
        *("latent_ovi_audio", "flashvsr_LQ_images"),
    }
)
"""Of what ComfyUI-WanVideoWrapper's samplers return, beside the latents."""


def latent_tensors(
    value: Any, sampling: Sampling, config: WanConfig, status: Status, references: int = 0
) -> dict[str, Tensor]:
    """`samples` [C, T, h, w] and `noise_mask` [T, h, w] of a LATENT, as far as it holds them.

    A LATENT of zeros, which ComfyUI's nodes make for a video from noise, holds none; its size must fit all the same.

    Args:
        references: latent frames of pictures in front of the video's.
    Raises:
        ValueError: in the user's words, if it is not one video of this node's size for this model.
    """
    from ...wan.vae.latents import denormalise

    samples = _samples(value)
    channels, *size = samples.shape
    mask = _noise_mask(value, size)
    if channels not in LATENT_SPACES:
        raise ValueError(f"samples have {channels} channels; Wan's latents have {' or '.join(map(str, LATENT_SPACES))}")
    check_video_size("samples", [size[0] - references, *size[1:]], LATENT_SPACES[channels].stride, sampling)
    if mask is None and not samples.any():
        return {}
    if channels != config.out_dim:
        raise ValueError(f"samples have {channels} channels; this model's latents have {config.out_dim}")
    if is_normalised(value):
        samples = denormalise(samples, channels)
        status.note("samples are ComfyUI-WanVideoWrapper's: they were scaled to ComfyUI's latents")
    found = {"samples": samples.float().contiguous()}
    return found if mask is None else {**found, "noise_mask": mask}


def is_normalised(value: dict[str, Any]) -> bool:
    """Whether a LATENT has the wrapper's scale: its samplers add keys, its encoder a noise_mask that may be None."""
    return not WRAPPER_KEYS.isdisjoint(value) or ("noise_mask" in value and value["noise_mask"] is None)


def check_video_size(name: str, size: Sequence[int], stride: int, sampling: Sampling) -> None:
    """Raises ValueError naming both sizes unless latents [T, h, w] = `size` are those of the node's video.

    Args:
        stride: pixels per latent row and column.
    """
    frames, rows, cols = size
    wanted = ((sampling.num_frames - 1) // TEMPORAL_STRIDE + 1, sampling.height // stride, sampling.width // stride)
    if (frames, rows, cols) != wanted:
        raise ValueError(
            f"{name} is for {cols * stride}x{rows * stride}, {(frames - 1) * TEMPORAL_STRIDE + 1} frames; this node "
            f"makes {sampling.width}x{sampling.height}, {sampling.num_frames} frames. Set both to the same"
        )


def _samples(value: Any) -> Tensor:
    """[C, T, h, w] on the CPU, as it is."""
    allowed = "a video's LATENT [1, C, T, h, w]"
    if not isinstance(value, dict) or value.get("samples") is None:
        raise ValueError(f"samples is {kind_of(value)}; it must be {allowed}")
    samples = tensor_of(value.get("samples"), "samples", allowed)
    if samples.ndim != 5 or 0 in samples.shape:
        raise ValueError(f"samples is of shape {list(samples.shape)}; it must be {allowed}")
    if samples.shape[0] != 1:
        raise ValueError(f"samples hold {samples.shape[0]} videos; this node makes one. Set batch_size to 1")
    if is_set(value.get("has_ref")):
        raise ValueError("samples begin with a reference frame (has_ref), which this node does not take")
    return samples[0]


def _noise_mask(value: dict[str, Any], size: Sequence[int]) -> Tensor | None:
    """[T, h, w] float32; None if everything is to be made."""
    if value.get("noise_mask") is None:
        return None
    mask = tensor_of(value["noise_mask"], "noise_mask of samples", f"a tensor {[1, 1, *size]}", mask=True)
    if mask.numel() and bool(mask.eq(1).all()):
        return None
    if tuple(mask.shape) != (1, 1, *size):
        raise ValueError(
            f"samples have a noise_mask of shape {list(mask.shape)}; it must be {[1, 1, *size]}, "
            "as Wan22ImageToVideoLatent makes it"
        )
    return mask[0, 0].float().contiguous()
