"""Nodes for the tests' ComfyUI: what CLIP Text Encode makes with a CLIP of type wan, CLIP Vision Encode, and
Wan22ImageToVideoLatent.

ComfyUI's own loaders take umT5-xxl and the Wan2.2 VAE at full size only, which are 5.7 and 1.4 GB at the least.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

ROWS = 512
"""ComfyUI pads prompts to this many rows, with zeros."""


class TestCoreConditioning:
    FUNCTION = "make"
    CATEGORY = "test"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sizes = {"tokens": ("INT", {"default": 9}), "channels": ("INT", {"default": 64, "max": 4096})}
        return {"required": {"seed": ("INT", {"default": 0}), **sizes}}

    def make(self, seed: int, tokens: int, channels: int) -> tuple[list[list[Any]]]:
        rows = torch.zeros(1, ROWS, channels)
        rows[:, :tokens] = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed))
        return ([[rows, {"pooled_output": None}]],)


class TestKnownFrame:
    """Latents of TI2V-5B of which the first frame is given."""

    FUNCTION = "make"
    CATEGORY = "test"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed: int) -> tuple[dict[str, torch.Tensor]]:
        samples = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(1, 1, 3, 4, 6)
        mask[:, :, 0] = 0
        return ({"samples": samples, "noise_mask": mask},)


class TestFramesAsLatent:
    """Frames as they are, for Save Latent: pictures are saved in 8 bits."""

    FUNCTION = "make"
    CATEGORY = "test"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}}

    def make(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor]]:
        return ({"samples": images.contiguous()},)


class TestClipVision:
    """What CLIP Vision Encode makes with clip_vision_h, which is 1.3 GB."""

    FUNCTION = "make"
    CATEGORY = "test"
    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed: int) -> tuple[SimpleNamespace]:
        states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(seed))
        return (SimpleNamespace(penultimate_hidden_states=states),)


NODES = (TestCoreConditioning, TestKnownFrame, TestFramesAsLatent, TestClipVision)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
