"""Our step cache reuses the steps that ComfyUI's EasyCache does, with the same latents."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
import torch
from core_sampling import Modules
from torch import Tensor
from wan_pack.wan.model.config import HIGH_NOISE
from wan_pack.wan.sampling.step_cache import END, START, StepCache

STEPS = 30


def velocity(x: Tensor, sigma: float) -> Tensor:
    """Something smooth that moves with both."""
    return torch.sin(1.3 * x + sigma) + 0.2 * x * (1 - sigma) ** 2 - 0.5 * sigma


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 1.0])
def test_same_steps_and_latents(core: Modules, threshold: float):
    module = importlib.import_module("comfy_extras.nodes_easycache")
    holder = module.EasyCacheHolder(threshold, START, END, 1, False, output_channels=4)
    sigmas = [1 - i / STEPS for i in range(STEPS + 1)]
    holder.start_t, holder.end_t = 1 - START, 1 - END
    uuid, asked = uuid4(), []

    def evaluate(x: Tensor, sigma: float, *_: Any) -> Tensor:
        asked.append(sigma)
        return velocity(x, sigma)

    start = torch.randn(1, 4, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    theirs = start
    for sigma, following in pairwise(sigmas):
        holder.skip_current_step = False
        options = {"easycache": holder, "sigmas": torch.tensor([sigma], dtype=torch.float64), "uuids": [uuid]}
        out = module.easycache_forward_wrapper(evaluate, theirs.clone(), sigma, None, None, options)
        theirs = theirs + (following - sigma) * out

    def predict(expert: str, tokens: Tensor, timestep: float, passes: tuple[bool, ...]) -> list[Tensor]:
        return [velocity(tokens, timestep)]

    cache = StepCache(
        predict, threshold=threshold, steps=range(STEPS), schedule_steps=STEPS,
        mean=lambda tensor: tensor.abs().mean().item(),
    )  # fmt: skip
    ours = start
    for sigma, following in pairwise(sigmas):
        ours = ours + (following - sigma) * cache(HIGH_NOISE, ours, sigma, (True,))[0]
    assert [i for i in range(STEPS) if sigmas[i] not in asked] == cache.reused
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(cache.reused) > (3 if threshold >= 0.1 else -1)
