"""What nodes add to the weights: as with ComfyUI's own model, through LoRA files that live as long as they are used."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from core_sampling import Modules, TwoModels
from safetensors.torch import load_file
from torch import Tensor
from wan_pack.demo.tiny_expert import DIM, FFN_DIM, lora
from wan_pack.nodes.core.patch_files import KEPT

LIMIT = 1e-4
Q = "diffusion_model.blocks.0.self_attn.q"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


LORAS: dict[str, dict[str, Tensor]] = {
    "LoRA": lora(1),
    "LoRA without alpha": {name: tensor for name, tensor in lora(2).items() if not name.endswith("alpha")},
    "LoHa": {
        **{f"{Q}.hada_w{i}_a": noise(DIM, 4, seed=i) for i in (1, 2)},
        **{f"{Q}.hada_w{i}_b": noise(4, DIM, seed=i + 2) * 10 for i in (1, 2)},
        f"{Q}.alpha": torch.tensor(8.0),
    },
    "LoKr": {f"{Q}.lokr_w1": noise(4, 4), f"{Q}.lokr_w2": noise(DIM // 4, DIM // 4, seed=2)},
    "differences": {
        "diffusion_model.blocks.1.ffn.0.diff": noise(FFN_DIM, DIM),
        "diffusion_model.blocks.1.ffn.0.diff_b": noise(FFN_DIM),
        "diffusion_model.blocks.0.norm3.diff": noise(DIM),
        "diffusion_model.patch_embedding.diff": noise(DIM, 16, 1, 2, 2),
    },
}


def with_lora(core: Modules, model: Any, tensors: dict[str, Tensor], strength: float = 0.8) -> Any:
    """As ComfyUI's LoRA loaders, once the file is read."""
    return core["comfy.sd"].load_lora_for_models(model, None, dict(tensors), strength, 0)[0]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", LORAS)
def test_loras_of_core(t2v: TwoModels, name: str) -> None:
    made = t2v.same(
        lambda core, model: core["sampled"](with_lora(core, model, LORAS[name]), sampler="euler"), limit=LIMIT
    )
    assert (made - t2v.core["sampled"](t2v.ours)).abs().max() > 0.01, "it changes something"


def test_several_loras_add_up(t2v: TwoModels) -> None:
    def graph(core: Modules, model: Any) -> Tensor:
        for strength, name in ((0.5, "LoRA"), (-0.7, "LoRA without alpha"), (0.0, "LoHa"), (1.0, "differences")):
            model = with_lora(core, model, LORAS[name], strength)
        return core["sampled"](model)

    t2v.same(graph, limit=LIMIT)


def test_a_lora_is_a_file_for_as_long_as_it_is_used(t2v: TwoModels, tmp_path: Path) -> None:
    t2v.core["sampled"](with_lora(t2v.core, t2v.ours, LORAS["LoRA"], strength=0.0))
    model = with_lora(t2v.core, t2v.ours, LORAS["LoRA"])
    assert files(tmp_path) == [], "written when a sampling needs it"
    t2v.core["sampled"](model)
    (first,) = tmp_path.iterdir()
    written = first.stat().st_mtime_ns
    again = with_lora(t2v.core, t2v.ours, LORAS["LoRA"], strength=0.3)
    t2v.core["sampled"](again)
    assert files(tmp_path) == [first.name] and first.stat().st_mtime_ns == written, "the same values: the same file"
    del model
    gc.collect()
    assert files(tmp_path) == [first.name]
    del again
    gc.collect()
    assert files(tmp_path) == [first.name], "for another strength"
    t2v.core["sampled"](with_lora(t2v.core, t2v.ours, LORAS["LoRA"], strength=0.7))
    gc.collect()
    assert first.stat().st_mtime_ns == written, "ranks know it again"
    for index in range(KEPT):
        changed = {name: tensor + index + 1 for name, tensor in LORAS["LoRA"].items()}
        t2v.core["sampled"](with_lora(t2v.core, t2v.ours, changed))
        gc.collect()
    assert len(files(tmp_path)) == KEPT and first.name not in files(tmp_path)


def test_a_lora_file_that_was_removed_is_written_again(t2v: TwoModels, tmp_path: Path) -> None:
    """ComfyUI's temp folder may be emptied while it runs."""
    model = with_lora(t2v.core, t2v.ours, LORAS["LoRA"])
    before = t2v.core["sampled"](model)
    (file,) = tmp_path.iterdir()
    file.unlink()
    assert (t2v.core["sampled"](model) == before).all()


def refusal(t2v: TwoModels, model: Any) -> str:
    with pytest.raises(ValueError) as refused:
        t2v.core["sampled"](model)
    assert t2v.evaluators == [], "before the first step"
    return str(refused.value)


def test_changes_that_no_lora_file_can_say_are_refused(t2v: TwoModels) -> None:
    key = f"{Q}.weight"
    replaced = t2v.ours.clone()
    replaced.add_patches({key: ("set", (noise(DIM, DIM),))})
    assert "set_weight" in refusal(t2v, replaced)
    merged = t2v.ours.clone()
    merged.add_patches({key: (noise(DIM, DIM),)}, 0.5, 0.5)
    assert "merges another model" in refusal(t2v, merged)
    cut = t2v.ours.clone()
    cut.add_patches({(key, (0, 0, 8)): (noise(8, DIM),)})
    assert "a part of a weight" in refusal(t2v, cut)
    unknown = t2v.ours.clone()
    unknown.add_patches({key: ("model_as_lora", (noise(DIM, DIM),))})
    assert "which no LoRA file can say" in refusal(t2v, unknown)
    butterfly = with_lora(t2v.core, t2v.ours, {f"{Q}.oft_blocks": noise(2, 4, DIM // 4, DIM // 4)})
    assert "BOFT" in refusal(t2v, butterfly)
    direct = t2v.ours.clone()
    direct.patches = {key: [(1.0, (noise(DIM, DIM),), 1.0, None, None)]}
    assert "past ComfyUI's add_patches" in refusal(t2v, direct)


def test_a_file_that_two_models_use_stays_until_the_last_is_gone(t2v: TwoModels, tmp_path: Path) -> None:
    """However many others come and go meanwhile."""
    one, two = (with_lora(t2v.core, t2v.ours, LORAS["LoRA"], strength) for strength in (0.5, 0.8))
    t2v.core["sampled"](one)
    t2v.core["sampled"](two)
    (file,) = tmp_path.iterdir()
    del one

    def others() -> None:
        gc.collect()
        for index in range(KEPT + 1):
            changed = {name: tensor * (index + 2) for name, tensor in LORAS["LoRA"].items()}
            t2v.core["sampled"](with_lora(t2v.core, t2v.ours, changed))
            gc.collect()

    others()
    assert file.exists() and len(files(tmp_path)) == KEPT + 1
    del two
    others()
    assert not file.exists() and len(files(tmp_path)) == KEPT


def test_an_alpha_is_written_as_exactly_as_it_is_given(t2v: TwoModels, tmp_path: Path) -> None:
    """ComfyUI holds a number, the file a tensor."""
    tensors = {**LORAS["LoRA without alpha"]}
    ups = [name for name in tensors if "lora_up" in name]
    tensors |= {name.replace("lora_up.weight", "alpha"): torch.tensor(7.3) for name in ups}
    t2v.core["sampled"](with_lora(t2v.core, t2v.ours, tensors))
    (file,) = tmp_path.iterdir()
    alphas = {tensor.item() for name, tensor in load_file(file).items() if name.endswith(".alpha")}
    assert alphas == {torch.tensor(7.3).item()}
