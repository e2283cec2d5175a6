"""VACE models behind ComfyUI's MODEL socket: what WanVaceToVideo conditions them with reaches the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from core_nodes import in_windows
from core_sampling import STEPS, Conditioning, Modules, PixelVae, TwoModels, empty_latents, text
from torch import Tensor

LIMIT = 1e-4
WIDTH, HEIGHT, FRAMES = 64, 48, 9
MASK = torch.zeros(FRAMES, HEIGHT, WIDTH)
MASK[3:, 10:, 20:50] = 1


@pytest.fixture
def vace(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> TwoModels:
    return TwoModels(core, expert_files["VACE"], tmp_path)


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def followed(core: Modules, strengths: Sequence[float] = (0.8,), **inputs: Any) -> dict[str, Any]:
    """What a chain of WanVaceToVideo, one for each strength, gives KSampler: prompts and latents."""
    vae = PixelVae()
    positive, negative = text(1), text(2)
    for seed, strength in enumerate(strengths):
        given = {"control_video": pixels(seed, FRAMES, HEIGHT, WIDTH, 3), **inputs, "strength": strength}
        positive, negative, latent, _ = (
            core["comfy_extras.nodes_wan"]
            .WanVaceToVideo.execute(positive, negative, vae, WIDTH, HEIGHT, FRAMES, 1, **given)
            .result
        )
    return {"positive": positive, "negative": negative, "latent_image": latent}


def test_a_control_video_with_mask_and_reference(vace: TwoModels) -> None:
    given = followed(vace.core, control_masks=MASK, reference_image=pixels(9, 1, HEIGHT, WIDTH, 3))
    made = vace.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)
    (evaluator,) = vace.evaluators
    assert evaluator.batches[0][0] == (2, 16, 4, 6, 8), "the reference's frame is in front"
    assert len(evaluator.batches) == STEPS and len(evaluator.controls) == 1, "one object for both prompts and all steps"
    without = {
        **given,
        **followed(vace.core, (0.0,), control_masks=MASK, reference_image=pixels(9, 1, HEIGHT, WIDTH, 3)),
    }
    assert (made - vace.core["sampled"](vace.ours, **without)).abs().max() > 0.01, "the control counts"


def test_a_chain_of_controls(vace: TwoModels) -> None:
    given = followed(vace.core, (1.0, 0.4))
    vace.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)
    assert {control.strength for control in vace.evaluators[0].controls.values()} == {1.0, 0.4}


def test_text_alone_is_completed_by_core(vace: TwoModels) -> None:
    vace.same(lambda core, model: core["sampled"](model), limit=LIMIT)


def test_a_batch_and_prompts_with_controls_of_their_own(vace: TwoModels) -> None:
    """Whose strengths differ, and so come in calls of their own."""
    given, other = followed(vace.core), followed(vace.core, (0.3,))
    given |= {"negative": other["negative"], "latent_image": empty_latents(frames=3, batch=2)}
    vace.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)


def changed(prompt: Conditioning, **values: Any) -> Conditioning:
    return [[rows, {**rest, **values}] for rows, rest in prompt]


@pytest.mark.parametrize("how", ["other latents", "area", "windows"])
def test_a_control_of_another_size_is_refused(how: str, vace: TwoModels) -> None:
    core, given, model = vace.core, followed(vace.core), vace.ours
    if how == "other latents":
        given["latent_image"] = empty_latents(frames=4)
    elif how == "area":
        given["positive"] = core["nodes"].ConditioningSetArea().append(given["positive"], 32, 32, 0, 0, 1.0)[0]
    elif hasattr(core["comfy.model_base"].WAN21_Vace, "resize_cond_for_context_window"):
        # Newer ones cut it: it has the size of each window.
        vace.same(lambda core, model: core["sampled"](in_windows(core, model, 5, 1), **given), limit=LIMIT)
        return
    else:
        model = in_windows(core, model, 5, 1)
    with pytest.raises(ValueError, match=r"the VACE control is of \[3, 6, 8\].*take the latents of the same WanVace"):
        core["sampled"](model, **given)


def test_each_window_follows_its_part_where_comfyui_cuts_the_control(
    vace: TwoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As newer ones do. Copies of a part are known again: of all steps each window has one."""
    handler = vace.core["comfy.context_windows"].IndexListContextHandler
    whole = handler.get_resized_cond

    def cut(self: Any, conds: Any, x: Tensor, window: Any, device: Any = None) -> Any:
        made = whole(self, conds, x, window, device)
        for one in made or []:
            control = one["model_conds"]["vace_context"]
            one["model_conds"]["vace_context"] = control._copy_with(window.get_tensor(control.cond, dim=3))
        return made

    monkeypatch.setattr(handler, "get_resized_cond", cut)
    given = followed(vace.core, control_masks=MASK)

    vace.same(lambda core, model: core["sampled"](in_windows(core, model, 5, 4), **given), limit=LIMIT)
    (evaluator,) = vace.evaluators
    assert len(evaluator.controls) == 2 and len(evaluator.batches) == 2 * STEPS


def test_a_model_that_follows_nothing_ignores_a_control_as_in_core(t2v: TwoModels) -> None:
    given = followed(t2v.core)
    t2v.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)
    assert t2v.evaluators[0].controls == {}
