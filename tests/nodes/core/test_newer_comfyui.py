"""A ComfyUI in which something that the MODEL is built on is called otherwise, has more, or is gone.

Stand-ins for what was read of 0.38.1 (docs/versions.md), which cannot be run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_nodes import in_windows
from core_sampling import Modules, TwoModels, empty_latents, text
from wan_pack.demo.tiny_expert import lora
from wan_pack.nodes.host.core_model import patcher_class


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    patcher_class.cache_clear()
    yield
    patcher_class.cache_clear()


@pytest.fixture
def newer(core: Modules, monkeypatch: pytest.MonkeyPatch) -> Modules:
    """Its patcher has more arguments and methods; its model writes down dtypes and asks for free memory there."""
    known = core["comfy.model_patcher"].ModelPatcher

    class Newer(known):
        def __init__(self, *given: Any, fast_disk: bool = False, **more: Any) -> None:
            super().__init__(*given, **more)
            self.fast_disk, self.cached_patcher_init = fast_disk, None

        def is_dynamic(self) -> bool:
            return False

        def clone(self, disable_dynamic: bool = False, model_override: Any = None, force_deepcopy: bool = False) -> Any:
            assert not force_deepcopy
            made = super().clone()
            return (
                type(made)(made.model, made.load_device, made.offload_device, made.model_size(), fast_disk=True)
                if (disable_dynamic)
                else made
            )

        def deepclone_multigpu(self, new_load_device: Any = None, models_cache: Any = None) -> Any:
            raise RuntimeError("the loader does not support it")

        def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> Any:
            return self.model.state_dict()

    monkeypatch.setattr(core["comfy.model_patcher"], "ModelPatcher", Newer)
    return core


def test_it_samples_is_cloned_and_takes_loras(newer: Modules, expert_files: dict[str, Path], tmp_path: Path) -> None:
    two = TwoModels(newer, expert_files["T2V"], tmp_path)
    two.same(lambda core, model: core["sampled"](model.clone(disable_dynamic=False)), limit=1e-4)

    def with_lora(core: Modules, model: Any) -> Any:
        return core["sampled"](core["comfy.sd"].load_lora_for_models(model, None, lora(1), 0.8, 0)[0])

    two.same(with_lora, limit=1e-4)
    assert two.ours.clone(disable_dynamic=True).fast_disk


def test_copies_of_weights_and_other_gpus_are_refused_by_name(
    newer: Modules, expert_files: dict[str, Path], tmp_path: Path
) -> None:
    ours = TwoModels(newer, expert_files["T2V"], tmp_path).ours
    for ask in (lambda: ours.clone(force_deepcopy=True), lambda: ours.model_state_dict_for_saving()):
        with pytest.raises(ValueError, match=r"no weights in ComfyUI.* load it with Load Diffusion Model$"):
            ask()
    with pytest.raises(ValueError, match=r"gpu_ids, gpu_count\).* load it with Load Diffusion Model$"):
        ours.deepclone_multigpu(new_load_device=torch.device("cuda:1"))


def without_wrapper(core: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(core["comfy.patcher_extension"].WrappersMP, "OUTER_SAMPLE")


def without_class(core: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(core["comfy.ldm.wan.model"], "VaceWanModel")


def without_argument(core: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core["comfy.supported_models_base"].BASE, "set_inference_dtype", lambda config, dtype: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [(without_wrapper, "OUTER_SAMPLE"), (without_class, "VaceWanModel"), (without_argument, "positional argument")],
)
def test_what_is_gone_is_said(
    core: Modules, expert_files: dict[str, Path], tmp_path: Path, change: Callable[..., None], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    change(core, monkeypatch)
    monkeypatch.setattr(core["comfy.sd"], "load_diffusion_model", lambda file: None)
    with pytest.raises(ValueError, match=rf"not one that the loaders for N GPUs know: .*{said}.*with ComfyUI 0\.3\.75"):
        TwoModels(core, expert_files["T2V"], tmp_path)


def test_a_lora_of_more_parts_than_are_known_is_refused(t2v: TwoModels) -> None:
    patch = SimpleNamespace(name="lora", weights=(torch.ones(256, 4), torch.ones(4, 256), *[None] * 5))
    model = t2v.ours.clone()
    model.add_patches({"diffusion_model.blocks.0.self_attn.q.weight": patch}, 1.0)
    with pytest.raises(ValueError, match=r"changes blocks\.0\.self_attn\.q\.weight by .*which no LoRA file can say"):
        t2v.core["sampled"](model)


def test_windows_of_another_pack_count_as_the_whole(t2v: TwoModels) -> None:
    from wan_pack.nodes.host.core_model import CoreSampling

    for handler, window in ((SimpleNamespace(), 9), (SimpleNamespace(context_length=4, dim=2), 4)):
        options = {"context_handler": handler}
        sampling = CoreSampling(None, {}, options, (1, 16, 9, 6, 8), torch.zeros(2))
        assert sampling.window == (1, 16, window, 6, 8)


@pytest.mark.parametrize("more", [{}, {"freenoise": True, "retain_first_frame": True}], ids=["plain", "both"])
def test_a_pictures_latents_are_cut_to_the_windows(
    core: Modules, expert_files: dict[str, Path], tmp_path: Path, more: dict[str, bool]
) -> None:
    """By newer ComfyUIs, which can keep the first frame in each; older ones fail, with their own model too."""
    shape = (1, 16, 4, 6, 8)
    known = torch.ones(1, 1, *shape[2:])
    known[:, :, :1] = 0
    picture = {"concat_latent_image": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    prompts = {
        name: [[rows, rest | picture | {"concat_mask": known}] for rows, rest in text(number)]
        for number, name in enumerate(("positive", "negative"))
    }
    two = TwoModels(core, expert_files["I2V"], tmp_path)
    given = prompts | {"latent_image": empty_latents(frames=4)}

    def graph(core: Modules, model: Any) -> Any:
        return core["sampled"](in_windows(core, model, 5, 4, **more), **given)

    if hasattr(core["comfy.model_base"].BaseModel, "resize_cond_for_context_window"):
        two.same(graph, limit=1e-4)
        return
    for model in (two.ours, two.theirs):
        with pytest.raises((RuntimeError, ValueError)):
            graph(core, model)
