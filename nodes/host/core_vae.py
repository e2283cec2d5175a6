"""ComfyUI's own VAE object around one that computes elsewhere: what its VAE sockets carry.

ComfyUI detects it, crops and scales pictures, cuts tiles and blends them, and tells nodes its sizes, as with one of its
own. Only the VAE itself has no weights here, and what it would compute is asked of a `VideoVae`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from . import host
from .core_model import of_a_known_comfyui, patcher_class

if TYPE_CHECKING:
    from torch import Tensor

NO_WEIGHTS = (
    "the VAE of Load VAE (N GPUs) has no weights in ComfyUI: other processes hold them. To save it, load it with Load "
    "VAE"
)
TILE = 256
"""Pixels of the sides of tiles, where a picture does not fit whole."""


class VideoVae(Protocol):
    """A VAE that computes elsewhere."""

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T, h, w], un-normalised -> a new [B, 3, F, H, W], float32, on the CPU, not cut to -1 to 1.

        Raises:
            ValueError: these are no such latents; ComfyUI's own exception where they do not fit the memory.
        """

    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, F, H, W] in -1 to 1 -> [B, C, T, h, w], un-normalised, float32, on the CPU. Raises the same."""

    def together(self) -> AbstractContextManager[None]:
        """What is asked for in it follows one upon another."""


def vae_without_weights(shapes: Mapping[str, tuple[int, ...]], upscale: int, remote: VideoVae) -> Any:
    """A VAE of ComfyUI, which holds no memory.

    Args:
        shapes: official tensor name -> shape, of a VAE that ComfyUI knows.
        upscale: pixels per row and column that are made for one of the video.
    Raises:
        ValueError: this ComfyUI does not know such a VAE.
    """
    with of_a_known_comfyui():
        return _vae_without_weights(shapes, upscale, remote)


def _vae_without_weights(shapes: Mapping[str, tuple[int, ...]], upscale: int, remote: VideoVae) -> Any:
    import torch

    kind, cpu = _vae_class(), torch.device("cpu")
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        vae = kind(sd=tensors, device=cpu, dtype=torch.float32)
    if vae.first_stage_model is None or vae.latent_dim != 3:
        raise ValueError("this ComfyUI does not know such a VAE; update ComfyUI")
    vae.remote = remote
    vae.first_stage_model = _stage_class()(remote)
    vae.patcher = patcher_class()(vae.first_stage_model, load_device=cpu, offload_device=cpu)
    # What is computed elsewhere takes no memory here.
    vae.memory_used_encode = vae.memory_used_decode = lambda *_: 1
    if upscale > 1:
        frames, *sides = vae.upscale_ratio
        vae.upscale_ratio = (frames, *(side * upscale for side in sides))
        vae.upscale_index_formula = (vae.upscale_index_formula[0], *vae.upscale_ratio[1:])
    return vae


@functools.cache
def _stage_class() -> type[Any]:
    """Made when ComfyUI is there, as torch is then."""
    from torch import nn

    class RemoteStage(nn.Module):
        """In the place of ComfyUI's own VAE module."""

        def __init__(self, remote: VideoVae) -> None:
            super().__init__()
            self._remote = remote

        def decode(self, latents: Tensor) -> Tensor:
            return self._remote.decode(latents)

        def encode(self, frames: Tensor) -> Tensor:
            return self._remote.encode(frames)

    return RemoteStage


@functools.cache
def _vae_class() -> type[Any]:
    """Made when ComfyUI is there: its VAE for one without weights."""
    from comfy import model_management
    from comfy.sd import VAE

    class WeightlessVae(VAE):
        """Has a `remote`, a `VideoVae`."""

        remote: VideoVae

        def model_size(self) -> int:
            return 0

        def get_sd(self) -> Any:
            raise ValueError(NO_WEIGHTS)

        def decode(self, samples_in: Tensor, vae_options: Mapping[str, Any] = {}) -> Tensor:
            if vae_options:
                raise ValueError(f"the VAE is given {', '.join(map(str, vae_options))}, which a Wan VAE does not take")
            frames: Tensor | None = None
            with contextlib.suppress(model_management.OOM_EXCEPTION):
                frames = self.remote.decode(samples_in)
            if frames is None:
                host.log("the processes ran out of GPU memory; the video is decoded again, tile by tile")
                tile = TILE // self.spacial_compression_decode()
                return self.decode_tiled(samples_in, tile_x=tile, tile_y=tile, overlap=tile // 4)
            # As `process_output` does, in place: they are large, and nobody else has them.
            return frames.add_(1.0).div_(2.0).clamp_(0.0, 1.0).to(self.output_device).movedim(1, -1)

        def decode_tiled(self, *given: Any, **settings: Any) -> Tensor:
            with self.remote.together():
                return super().decode_tiled(*given, **settings)

        def encode(self, *given: Any, **settings: Any) -> Tensor:
            with self.remote.together():
                return super().encode(*given, **settings)

        def encode_tiled(self, *given: Any, **settings: Any) -> Tensor:
            with self.remote.together():
                return super().encode_tiled(*given, **settings)

    return WeightlessVae
