"""A node for the tests' ComfyUI: CONDITIONING as CLIP Text Encode makes it with a CLIP of type wan.

ComfyUI's own loader takes umT5-xxl at full size only, which is 5.7 GB at the least.
"""

from __future__ import annotations

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
        return {"required": {"seed": ("INT", {"default": 0}), "tokens": ("INT", {"default": 9})}}

    def make(self, seed: int, tokens: int) -> tuple[list[list[Any]]]:
        rows = torch.zeros(1, ROWS, 64)
        rows[:, :tokens] = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed))
        return ([[rows, {"pooled_output": None}]],)


NODE_CLASS_MAPPINGS = {"TestCoreConditioning": TestCoreConditioning}
