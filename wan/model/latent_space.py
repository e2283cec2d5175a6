"""Where a transformer works: latents of one of two VAEs, their grid and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass

PATCH_SIZE = (1, 2, 2)
"""Latent frames, rows and columns per token."""
TEMPORAL_STRIDE = 4
"""Frames per latent frame; the first latent frame is one frame."""
FRAMES_AT_ONCE = 6
"""That a VAE computes on at the resolution of the video, at most; coarser stages take as many as need no more memory.
One takes a little longer, as each part copies what it keeps; the memory of more would pass what diffusers uses, and a
video's last frames would be late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpace:
    """The latents of one VAE, and the VAE as far as its header tells."""

    vae: str
    """Its name for people."""
    example: str
    """Files of it that people have."""
    channels: int
    stride: int
    """Pixels per latent row and column."""
    vae_bytes: int
    """Of the VAE's parameters in bf16."""
    fps: float
    """Frames per second that its models make, where what they follow does not say otherwise."""

    @property
    def pixel_multiple(self) -> int:
        """Width and height are whole tokens of so many pixels."""
        return self.stride * PATCH_SIZE[1]

    def shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """[C, T, h, w] of the latents of a video of width x height pixels."""
        frames = (num_frames - 1) // TEMPORAL_STRIDE + 1
        return self.channels, frames, height // self.stride, width // self.stride


WAN21 = LatentSpace(
    vae="Wan2.1 VAE",
    example="wan_2.1_vae.safetensors, Wan2.1_VAE.pth",
    channels=16,
    stride=8,
    vae_bytes=254_000_000,
    fps=16.0,
)
WAN22 = LatentSpace(
    vae="Wan2.2 VAE", example="wan2.2_vae.safetensors", channels=48, stride=16, vae_bytes=1_410_000_000, fps=24.0
)
LATENT_SPACES = {space.channels: space for space in (WAN21, WAN22)}
"""By their channels."""
