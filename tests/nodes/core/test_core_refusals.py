"""What needs the inside of the transformer is refused by name before the first step; what ComfyUI sees of memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_sampling import Modules, TwoModels, text
from wan_pack.demo.tiny_expert import lora
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.launch.launcher import JobFailed
from wan_pack.nodes.core.group_model import GroupModel
from wan_pack.nodes.host.core_model import CoreSampling, model_without_weights
from wan_pack.wan.checkpoint.checkpoint import Checkpoint


def same(output: Any, *_: Any) -> Any:
    return output


def rope(core: Modules, model: Any) -> None:
    model.set_model_rope_options(1.0, 0.0, 1.0, 0.0, 0.5, 0.0)


def attention(core: Modules, model: Any) -> None:
    model.model_options["transformer_options"]["optimized_attention_override"] = same


def injection(core: Modules, model: Any) -> None:
    inject = core["comfy.patcher_extension"].PatcherInjection(same, same)
    model.set_injections("other pack", [inject])


def compiled(core: Modules, model: Any) -> None:
    core["comfy_api.torch_helpers.torch_compile"].set_torch_compile_wrapper(model=model, backend="eager")


PATCHES: dict[str, tuple[Callable[[Modules, Any], None], str]] = {
    "block": (lambda core, model: model.set_model_patch_replace(same, "dit", "double_block", 1), "patches_replace"),
    "attention output": (lambda core, model: model.set_model_attn1_output_patch(same), r"\(patches\)"),
    "attention": (attention, "optimized_attention_override"),
    "rotary positions": (rope, "rope_options"),
    "module": (lambda core, model: model.add_object_patch("diffusion_model.blocks.0", same), "blocks.0"),
    "weight wrapper": (lambda core, model: model.add_weight_wrapper("diffusion_model.head.head.weight", same), "wraps"),
    "injection": (injection, "injects modules into the model .other pack"),
    "compilation": (compiled, "torch_compile of Wan Video Distributed Config"),
}
CONDITIONING = {
    "control": (lambda core: core["comfy.controlnet"].ControlBase(), "control net"),
    "hooks": (lambda core: core["comfy.hooks"].create_hook_lora(lora(1), 1.0, 0.0), "LoRAs by time"),
    "time_dim_concat": (lambda core: torch.zeros(1, 16, 1, 6, 8), "Phantom"),
    "context_latents": (lambda core: [torch.zeros(1, 16, 1, 6, 8)], "in context"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_the_inside(t2v: TwoModels, name: str) -> None:
    patch, said = PATCHES[name]
    model = t2v.ours.clone()
    patch(t2v.core, model)
    with pytest.raises(ValueError, match=f"{said}.*take that node out, or load the model with Load Diffusion Model"):
        t2v.core["sampled"](model)
    assert t2v.evaluators == []
    t2v.core["sampled"](t2v.ours)


def another_forward(block: Any) -> None:
    block.self_attn.forward = same


def a_hook(block: Any) -> None:
    block.ffn.register_forward_pre_hook(same)


def another_module(block: Any) -> None:
    block.ffn = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "said"),
    [(another_forward, r"blocks\.1\.self_attn"), (a_hook, r"blocks\.1\.ffn"), (another_module, r"blocks\.1\.ffn")],
)
def test_what_nodes_change_past_the_patcher(t2v: TwoModels, change: Callable[[Any], None], said: str) -> None:
    change(t2v.ours.model.diffusion_model.blocks[1])
    with pytest.raises(ValueError, match=rf"changes what the transformer computes \({said}.*take that node out"):
        t2v.core["sampled"](t2v.ours)
    assert t2v.evaluators == []


def test_a_method_that_is_replaced_for_a_call(t2v: TwoModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As packs do from within a wrapper around the model."""

    def wrapper(apply: Callable[..., Any], given: dict[str, Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(t2v.ours.model.diffusion_model, "forward_orig", same)
            return apply(given["input"], given["timestep"], **given["c"])

    model = t2v.ours.clone()
    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match=r"changes what the transformer computes \(forward_orig\)"):
        t2v.core["sampled"](model)
    t2v.core["sampled"](t2v.ours)


def test_conditioning_that_is_not_known_is_refused(t2v: TwoModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a newer ComfyUI gives its transformer."""
    known = t2v.ours.model.extra_conds
    conds = t2v.core["comfy.conds"]

    def more(**given: Any) -> dict[str, Any]:
        new = {"poses": conds.CONDRegular(torch.zeros(1, 16, 1, 6, 8)), "empty": conds.CONDConstant(None)}
        return known(**given) | new

    monkeypatch.setattr(t2v.ours.model, "extra_conds", more)
    with pytest.raises(ValueError, match=r"the conditioning holds what is not known here \(poses\).*take that"):
        t2v.core["sampled"](t2v.ours)
    assert t2v.evaluators == []


@pytest.mark.parametrize("name", CONDITIONING)
def test_conditioning_of_the_inside(t2v: TwoModels, name: str) -> None:
    make, said = CONDITIONING[name]
    prompt = [[rows, {**rest, name: make(t2v.core)}] for rows, rest in text(1)]
    # In either prompt, and wherever it stands in it.
    for given in ({"positive": prompt}, {"negative": prompt}, {"positive": text(3) + prompt}):
        with pytest.raises(ValueError, match=f"{said}.*take that node out"):
            t2v.core["sampled"](t2v.ours, **given)
    assert t2v.evaluators == []


def test_guidance_that_leaves_out_layers_is_refused_when_it_does(t2v: TwoModels) -> None:
    """It patches the model for calls of its own, in the middle of a step."""
    node = t2v.core["comfy_extras.nodes_slg"].SkipLayerGuidanceDiT
    (model,) = node.execute(t2v.ours, 2.0, 0.0, 1.0, "1", "1", 0.0).result
    with pytest.raises(ValueError, match=r"skip layer guidance.*take that node out"):
        t2v.core["sampled"](model)
    assert [evaluator.closed for evaluator in t2v.evaluators] == [1]


def test_an_error_of_the_evaluator_ends_the_sampling(t2v: TwoModels, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any) -> None:
        raise JobError("rank 1 was killed")

    with monkeypatch.context() as patched:
        patched.setattr("plain_evaluator.PlainEvaluator.evaluate", evaluate)
        with pytest.raises(JobError, match="rank 1 was killed"):
            t2v.core["sampled"](t2v.ours)
    assert [evaluator.closed for evaluator in t2v.evaluators] == [1]
    t2v.core["sampled"](t2v.ours)
    assert [evaluator.closed for evaluator in t2v.evaluators] == [1, 1]


def test_full_memory_is_told_as_comfyui_tells_it(t2v: TwoModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has advice for it, and lets its own models go."""

    def evaluate(*_: Any) -> None:
        raise JobFailed("rank 1: CUDA out of memory", rank=1, out_of_memory=True, folder=None, log="")

    monkeypatch.setattr("plain_evaluator.PlainEvaluator.evaluate", evaluate)
    with pytest.raises(t2v.core["comfy.model_management"].OOM_EXCEPTION, match="rank 1: CUDA out of memory"):
        t2v.core["sampled"](t2v.ours)
    assert [evaluator.closed for evaluator in t2v.evaluators] == [1]


def test_outside_of_a_sampling_nothing_is_computed(t2v: TwoModels) -> None:
    model = t2v.ours.model
    with pytest.raises(ValueError, match="outside of a sampling"):
        model.apply_model(torch.zeros(1, 16, 3, 6, 8), torch.ones(1), c_crossattn=text(1)[0][0])


def test_transformers_with_further_inputs_are_refused(core: Modules, expert_files: dict[str, Path]) -> None:
    """ComfyUI's conditioning of them is not sent on."""
    humo = {"audio_proj.audio_proj_glob_1.layer.bias": (512,)}
    shapes = {**Checkpoint([expert_files["I2V"]]).shapes, **humo}
    with pytest.raises(ValueError, match="runs in Wan Video Distributed Inference only; it cannot be a MODEL yet"):
        model_without_weights(shapes, object())


def test_nothing_is_held_or_moved(t2v: TwoModels) -> None:
    """By a model that ComfyUI samples, unloads, clones and deletes as one of its own."""
    management = t2v.core["comfy.model_management"]
    before = t2v.core["sampled"](t2v.ours)
    assert any(loaded.model is t2v.ours for loaded in management.current_loaded_models)
    assert (t2v.ours.model_size(), t2v.ours.loaded_size()) == (0, 0)
    assert t2v.ours.memory_required((2, 16, 21, 90, 160)) == 0
    management.free_memory(1e30, torch.device("cpu"))
    assert not any(loaded.model is t2v.ours for loaded in management.current_loaded_models)
    management.unload_all_models()
    assert (t2v.core["sampled"](t2v.ours.clone()) == before).all()
    weights = t2v.ours.model.diffusion_model.state_dict().values()
    assert all(weight.is_meta for weight in weights) and t2v.ours.partially_unload(torch.device("cpu"), 1) == 0


def test_a_copied_model_option_does_not_copy_the_model(t2v: TwoModels) -> None:
    copied = copy.deepcopy(t2v.ours.clone().model_options)
    assert copied == t2v.ours.model_options


def test_what_would_copy_weights_says_where_they_are(t2v: TwoModels) -> None:
    """ModelSave, merging, LoRA extraction."""
    for ask in (t2v.ours.get_key_patches, t2v.ours.model_state_dict, lambda: t2v.ours.state_dict_for_saving()):
        with pytest.raises(ValueError, match=r"no weights in ComfyUI.* load it with Load Diffusion Model$"):
            ask()


def test_of_samplings_inside_of_each_other_the_inner_one_is_asked() -> None:
    """As a node runs one in the middle of another one's step."""
    asked: list[str] = []

    class Answering:
        """One sampling's evaluator."""

        def __init__(self, name: str) -> None:
            self.name = name

        def evaluate(self, x: torch.Tensor, timesteps: torch.Tensor, samples: object) -> torch.Tensor:
            asked.append(self.name)
            return x

        def close(self) -> None:
            asked.append(f"{self.name} closed")

    model = GroupModel(lambda sampling: lambda: Answering(sampling.options["name"]))  # type: ignore[arg-type]
    patcher = SimpleNamespace(
        patches={}, attachments={}, injections={}, weight_wrapper_patches={}, object_patches={}, wrappers={}
    )

    def sample(name: str, inside: object = None) -> None:
        def run() -> torch.Tensor:
            latents = torch.zeros(1, 16, 1, 2, 2)
            given = latents, torch.zeros(1), torch.zeros(1, 3, 8), {}, {}
            model.velocity(*given)
            if inside is not None:
                sample(*inside)
                model.velocity(*given)
            return latents

        model.sample(CoreSampling(patcher, {}, {"name": name}, (1, 16, 1, 2, 2), torch.linspace(1, 0, 3)), run)

    sample("outer", ("inner", ("innermost",)))
    sample("next")
    assert asked == [
        "outer", "inner", "innermost", "innermost closed", "inner", "inner closed", "outer", "outer closed",
        "next", "next closed",
    ]  # fmt: skip
