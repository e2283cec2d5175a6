"""What ComfyUI conditions the model with reaches the evaluations: pictures, known frames, areas, masks, ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_sampling import STEPS, Conditioning, Modules, TwoModels, empty_latents, text
from torch import Tensor

LIMIT = 1e-4


@pytest.fixture
def models(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> Callable[[str], TwoModels]:
    return lambda kind: TwoModels(core, expert_files[kind], tmp_path)


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_picture(prompt: Conditioning, given: list[int]) -> Conditioning:
    """As ComfyUI's WanImageToVideo and WanFirstLastFrameToVideo leave it: latents, and a mask of what is not given.

    Args:
        given: latent frames.
    """
    mask = torch.ones(1, 4, 3, 6, 8)
    mask[:, :, given] = 0
    picture = {"concat_latent_image": noise(1, 16, 3, 6, 8), "concat_mask": mask}
    return [[rows, {**rest, **picture}] for rows, rest in prompt]


@pytest.mark.parametrize("given", [[0], [0, 2]], ids=["I2V", "FLF2V"])
def test_pictures(models: Callable[[str], TwoModels], given: list[int]) -> None:
    prompts = {"positive": with_picture(text(1), given), "negative": with_picture(text(2), given)}
    i2v = models("I2V")
    made = i2v.same(lambda core, model: core["sampled"](model, **prompts), limit=LIMIT)
    assert i2v.evaluators[0].batches[0][0] == (2, 36, 3, 6, 8), "with the picture's channels"
    assert (made - i2v.core["sampled"](i2v.ours)).abs().max() > 0.01, "the picture counts"


def test_known_frames_have_a_timestep_of_their_own(models: Callable[[str], TwoModels]) -> None:
    mask = torch.ones(1, 1, 3, 6, 8)
    mask[:, :, 0] = 0
    latents = {"samples": noise(1, 48, 3, 6, 8), "noise_mask": mask}
    ti2v = models("TI2V-5B")
    made = ti2v.same(lambda core, model: core["sampled"](model, latent_image=latents), limit=LIMIT)
    assert torch.allclose(made[:, :, 0], latents["samples"][:, :, 0], atol=1e-5)
    (first, *_) = ti2v.evaluators[0].timesteps
    assert first.shape == (2, 3) and (first[:, 0] == 0).all() and (first[:, 1:] > 900).all()


def test_5b_from_text_alone(models: Callable[[str], TwoModels]) -> None:
    models("TI2V-5B").same(
        lambda core, model: core["sampled"](model, latent_image=empty_latents(channels=48)), limit=LIMIT
    )


def test_prompts_by_area_mask_and_time(t2v: TwoModels) -> None:
    """An area of odd rows and columns too: ComfyUI's model pads it."""

    def graph(core: Modules, model: Any) -> Tensor:
        nodes = core["nodes"]
        # Areas are in pixels, eight for each column of the latents.
        (area,) = nodes.ConditioningSetArea().append(text(3), 40, 24, 8, 16, 1.0)
        (masked,) = nodes.ConditioningSetMask().append(text(4), torch.eye(6, 8), "default", 0.7)
        (late,) = nodes.ConditioningSetTimestepRange().set_range(text(5), 0.5, 1.0)
        return core["sampled"](model, positive=text(1) + area + masked + late)

    t2v.same(graph, limit=LIMIT)
    assert {shape[-2:] for shape, _ in t2v.evaluators[0].batches} == {(6, 8), (4, 6)}
    assert len(t2v.evaluators[0].texts) == 5


def test_what_core_ignores_is_ignored(t2v: TwoModels) -> None:
    """An image encoder's output for a model without an image branch, as templates of Wan2.1 leave it connected."""

    class Output:
        penultimate_hidden_states = noise(1, 257, 1280)

    def graph(core: Modules, model: Any) -> Tensor:
        prompt = [[rows, {**rest, "clip_vision_output": Output()}] for rows, rest in text(1)]
        return core["sampled"](model, positive=prompt)

    t2v.same(graph, limit=LIMIT)


def test_latents_that_are_given_are_denoised_in_part(t2v: TwoModels) -> None:
    latents = {"samples": noise(1, 16, 3, 6, 8)}
    t2v.same(lambda core, model: core["sampled"](model, latent_image=latents, denoise=0.5), limit=LIMIT)
    assert len(t2v.evaluators[0].batches) == STEPS
