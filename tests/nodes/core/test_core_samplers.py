"""ComfyUI's samplers with its own model and with one whose evaluations are computed elsewhere: the same latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_nodes import in_windows
from core_sampling import CFG, SEED, STEPS, Modules, TwoModels, empty_latents, text

LIMIT = 1e-4
SOLVED = 4
"""Steps, where a solver makes use of those before or where they are split."""
Graph = Callable[[Modules, Any], Any]
"""(ComfyUI's modules, MODEL) -> latents."""


def advanced(core: Modules, model: Any, **inputs: Any) -> Any:
    """ComfyUI's KSampler (Advanced)."""
    given = {"steps": SOLVED, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple", "positive": text(1)}
    given |= {"negative": text(2), "add_noise": "enable", "return_with_leftover_noise": "disable"}
    given |= {"start_at_step": 0, "end_at_step": 10_000, "noise_seed": SEED, "latent_image": empty_latents()}
    (latent,) = core["nodes"].KSamplerAdvanced().sample(model, **{**given, **inputs})
    return latent


def in_two_stages(core: Modules, model: Any) -> Any:
    half = advanced(core, model, end_at_step=SOLVED // 2, return_with_leftover_noise="enable")
    return advanced(core, model, start_at_step=SOLVED // 2, add_noise="disable", latent_image=half)["samples"]


def custom(core: Modules, model: Any) -> Any:
    nodes = core["comfy_extras.nodes_custom_sampler"]
    (guider,) = nodes.CFGGuider.execute(model, text(1), text(2), CFG).result
    (sampler,) = nodes.KSamplerSelect.execute("euler_ancestral").result
    (sigmas,) = nodes.BasicScheduler.execute(model, "beta", SOLVED, 1.0).result
    (noise,) = nodes.RandomNoise.execute(SEED).result
    return nodes.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, empty_latents()).result[0]["samples"]


def easy_cache(core: Modules, model: Any) -> Any:
    (model,) = core["comfy_extras.nodes_easycache"].EasyCacheNode.execute(model, 1.0, 0.0, 1.0, False).result
    return core["sampled"](model, steps=8)


def lazy_cache(core: Modules, model: Any) -> Any:
    (model,) = core["comfy_extras.nodes_easycache"].LazyCacheNode.execute(model, 1.0, 0.0, 1.0, False).result
    return core["sampled"](model, steps=8)


def context_windows(core: Modules, model: Any) -> Any:
    # 13 frames are 4 latent ones, of which a window has 2 and shares 1.
    model = in_windows(core, model, 5, 4, freenoise=True)
    return core["sampled"](model, latent_image=empty_latents(frames=4))


def one_after_the_other(core: Modules, model: Any) -> Any:
    """As nodes do that save memory: a wrapper that asks for each half of a batch alone, at one timestep."""

    def wrapper(apply: Callable[..., Any], given: dict[str, Any]) -> Any:
        parts = []
        for i in range(len(given["input"])):
            conds = dict(given["c"])
            conds["c_crossattn"] = conds["c_crossattn"][i : i + 1]
            parts.append(apply(given["input"][i : i + 1], given["timestep"][:1], **conds))
        return torch.cat(parts)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return core["sampled"](model)


def shifted(core: Modules, model: Any) -> Any:
    (model,) = core["comfy_extras.nodes_model_advanced"].ModelSamplingSD3().patch(model, 3.0)
    return core["sampled"](model)


GRAPHS: dict[str, Graph] = {
    **{
        name: lambda core, model, name=name: core["sampled"](model, name, steps=SOLVED)
        for name in ("euler", "uni_pc", "dpmpp_2m", "res_multistep", "dpmpp_sde", "euler_ancestral", "lcm")
    },
    "two stages": in_two_stages,
    "SamplerCustomAdvanced": custom,
    "EasyCache": easy_cache,
    "LazyCache": lazy_cache,
    "context windows": context_windows,
    "ModelSamplingSD3": shifted,
    "one after the other": one_after_the_other,
    "batch": lambda core, model: core["sampled"](model, latent_image=empty_latents(batch=2)),
    "prompts of other lengths": lambda core, model: core["sampled"](model, negative=text(2, tokens=520)),
}
EVALUATIONS = {"EasyCache": range(1, 8), "LazyCache": range(1, 8)}
"""Of graphs that leave some out, how many may be left."""


@pytest.mark.parametrize("name", GRAPHS)
def test_same_latents_as_with_core_model(t2v: TwoModels, name: str) -> None:
    t2v.same(GRAPHS[name], limit=LIMIT)
    assert t2v.evaluators and all(evaluator.closed == 1 for evaluator in t2v.evaluators)
    count = len(t2v.evaluators[0].batches)
    assert count in EVALUATIONS.get(name, range(1, 100)), count
    assert all(len(evaluator.texts) == 2 for evaluator in t2v.evaluators), "each text came as one object"


def test_both_halves_of_guidance_come_in_one_call(t2v: TwoModels) -> None:
    t2v.core["sampled"](t2v.ours)
    ((shape, conditional), *_), latents = t2v.evaluators[0].batches, (16, 3, 6, 8)
    assert shape == (2, *latents) and sorted(conditional) == [False, True]
    assert len(t2v.evaluators[0].batches) == STEPS


def test_a_prompt_stands_before_all_latents_of_its_batch(t2v: TwoModels) -> None:
    t2v.core["sampled"](t2v.ours, latent_image=empty_latents(batch=3))
    ((shape, conditional), *_) = t2v.evaluators[0].batches
    assert shape[0] == 6 and conditional in ([True] * 3 + [False] * 3, [False] * 3 + [True] * 3)


def test_guidance_of_one_evaluates_the_prompt_alone(t2v: TwoModels) -> None:
    t2v.same(lambda core, model: core["sampled"](model, cfg=1.0), limit=LIMIT)
    assert t2v.evaluators[0].batches == [((1, 16, 3, 6, 8), [True])] * STEPS


def test_a_patched_schedule_does_not_stay(t2v: TwoModels) -> None:
    """One that changes the timesteps: noise levels alone are looked up before the patch is put on."""
    before = t2v.core["sampled"](t2v.ours)
    (patched,) = t2v.core["comfy_extras.nodes_model_advanced"].ModelSamplingSD3().patch(t2v.ours, 3.0, multiplier=500)
    assert (t2v.core["sampled"](patched) - before).abs().max() > 0.01
    assert (t2v.core["sampled"](t2v.ours) == before).all()


def test_pictures_of_a_model_that_looks_at_them(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> None:
    """Wan2.1's first and last frame: what CLIP sees comes with ComfyUI's own conditioning."""
    models = TwoModels(core, expert_files["FLF2V"], tmp_path)

    def graph(core: Modules, model: Any) -> Any:
        seen = []
        for seed in (1, 2):
            output = core["comfy.clip_vision"].Output()
            states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(seed))
            output.penultimate_hidden_states = states
            seen.append(output)
        node = core["comfy_extras.nodes_wan"].WanImageToVideo
        joined = core["comfy.clip_vision"].Output()
        joined.penultimate_hidden_states = torch.cat([one.penultimate_hidden_states for one in seen], dim=-2)
        positive, negative, latent = node.execute(
            text(1), text(2), None, 64, 48, 9, 1, clip_vision_output=joined
        ).result
        return core["sampled"](model, positive=positive, negative=negative, latent_image=latent)

    models.same(graph, limit=LIMIT)
    (evaluator,) = models.evaluators
    assert len(evaluator.batches) == STEPS
