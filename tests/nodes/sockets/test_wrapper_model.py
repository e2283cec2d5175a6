"""WANVIDEOMODEL as ComfyUI-WanVideoWrapper's loader makes it, taken by the path that it carries."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import identity, use_model_folders
from wan_pack.demo.example import TinyModel
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.sockets.wrapper_model import AUTO, files_of

NAMES = TinyModel()


@pytest.fixture
def folders(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`, with the tiny experts and the tiny VAE in them."""
    use_model_folders(tmp_path, monkeypatch)
    for folder, names in (("vae", (NAMES.vae,)), ("diffusion_models", (NAMES.high_noise, NAMES.low_noise))):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(tiny_models / folder / name, tmp_path / folder)
    return tmp_path


class Loaded:
    """Makes WANVIDEOMODELs of the tiny experts."""

    def __init__(self, models: Path) -> None:
        self.experts = models / "diffusion_models"

    def __call__(
        self,
        name: str,
        *,
        options: dict[str, Any] | None = None,
        attributes: dict[str, Any] | None = None,
        **pipeline: Any,
    ) -> Any:
        transformer = {"vace_layers": None, "multitalk_audio_proj": None, "audio_model": None, **(attributes or {})}
        carried = {
            "base_path": str(self.experts / name),
            "model_name": name,
            "quantization": "disabled",
            "control_lora": False,
            "compile_args": None,
            "sd": {},
            "lora": None,
            **pipeline,
        }
        return SimpleNamespace(
            model=SimpleNamespace(diffusion_model=SimpleNamespace(**transformer), pipeline=carried),
            patches={},
            model_options={"transformer_options": {"block_swap_args": None, "merge_loras": True, **(options or {})}},
        )


@pytest.fixture
def loaded(folders: Path) -> Loaded:
    return Loaded(folders)


def path_of(files: Any) -> str:
    (file,) = files
    return Path(file.path).name


def test_both_experts_are_found_by_their_paths(loaded: Loaded) -> None:
    status = Status()
    model = files_of(loaded(NAMES.high_noise), loaded(NAMES.low_noise), AUTO, status)
    assert (path_of(model.high_noise), path_of(model.low_noise)) == (NAMES.high_noise, NAMES.low_noise)
    assert path_of(model.vae) == NAMES.vae
    assert model.text_encoder == model.high_noise_loras == model.low_noise_loras == ()
    assert status.warnings == []


@pytest.mark.parametrize(("name", "slot"), [(NAMES.high_noise, "high_noise"), (NAMES.low_noise, "low_noise")])
def test_one_expert_goes_where_its_name_says(loaded: Loaded, name: str, slot: str) -> None:
    model = files_of(loaded(name), None, AUTO, Status())
    assert path_of(getattr(model, slot)) == name
    assert {model.high_noise, model.low_noise} == {(), getattr(model, slot)}


def test_loras_of_the_loader_are_applied_from_their_files(loaded: Loaded, folders: Path) -> None:
    path = folders / "loras" / "fox.safetensors"
    identity(path)
    lora = [{"path": str(path), "strength": 0.7, "name": "fox", "blocks": {}, "layer_filter": "", "merge_loras": False}]
    high = loaded(NAMES.high_noise, lora=lora)
    # Unmerged, the wrapper keeps them as patches too: one per weight and LoRA.
    high.patches = {"blocks.0.self_attn.q.weight": [("lora",)], "blocks.0.self_attn.k.weight": [("lora",)]}
    model = files_of(high, loaded(NAMES.low_noise), AUTO, Status())
    (found,) = model.high_noise_loras
    assert (found.file.path, found.strength) == (str(path), 0.7)
    assert model.low_noise_loras == ()


def test_precision_of_the_loader_is_said_to_be_the_files(loaded: Loaded) -> None:
    status = Status()
    files_of(loaded(NAMES.high_noise, quantization="fp8_e4m3fn"), None, AUTO, status)
    assert status.warnings == [
        "model: the weights keep the precision of their file (WanVideoModelLoader says fp8_e4m3fn)"
    ]


def test_settings_of_the_wrappers_own_run_are_taken(loaded: Loaded) -> None:
    options = {"block_swap_args": {"blocks_to_swap": 20}, "attention_mode_override": "sageattn"}
    assert files_of(loaded(NAMES.high_noise, options=options), None, AUTO, Status()).high_noise


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attributes": {"vace_layers": [0, 5]}}, "model has VACE merged into it"),
        ({"attributes": {"multitalk_audio_proj": object()}}, "model has MultiTalk merged into it"),
        ({"attributes": {"audio_model": object()}}, "model has an audio model"),
        ({"control_lora": True}, "control LoRA"),
        ({"options": {"lora_scheduling_enabled": False}}, "set by WanVideoSetLoRAs.*set LoRAs in WanVideoModelLoader"),
        ({"options": {"ati_tracks": object(), "ultravico_alpha": 0.9}}, "model carries ati_tracks, ultravico_alpha"),
        ({"base_path": "/nowhere/x.safetensors"}, "the checkpoint of model is '/nowhere/x.safetensors'; it must be a"),
        ({"quantization": torch.ones(2), "control_lora": torch.ones(2)}, "control LoRA"),
        ({"lora": [{"path": "fox"}] * 65}, "LoRA of model holds 65 LoRAs; it must hold at most 64 LoRAs per expert"),
        ({"base_path": None}, "without a checkpoint's path; connect Load Wan Video Model"),
        (
            {
                "lora": [{"path": "/l", "strength": [1.0, 0.0], "name": "l"}],
                "options": {"lora_scheduling_enabled": True},
            },
            "LoRA of model: l has a strength for each step",
        ),
    ],
)
def test_what_no_file_holds_is_refused(loaded: Loaded, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files_of(loaded(NAMES.high_noise, **values), None, AUTO, Status())


def test_patches_without_a_list_are_refused(loaded: Loaded) -> None:
    model = loaded(NAMES.high_noise)
    model.patches = {"blocks.0.self_attn.q.weight": [("lora",)]}
    with pytest.raises(ValueError, match="model has 1 LoRAs patched into it, and names the files of 0"):
        files_of(model, None, AUTO, Status())
    # Of one LoRA that is named and two that are not, on some of the weights.
    identity(loaded.experts.parent / "loras" / "fox.safetensors")
    model = loaded(NAMES.high_noise, lora=[{"path": "fox", "strength": 1.0, "name": "fox", "blocks": {}}])
    model.patches = {"q": [1], "k": [1, 2, 3], "v": None}
    with pytest.raises(ValueError, match="model has 3 LoRAs patched into it, and names the files of 1"):
        files_of(model, None, AUTO, Status())


def test_another_object_is_refused(folders: Path) -> None:
    for value in (object(), SimpleNamespace(model=SimpleNamespace()), "model.safetensors"):
        with pytest.raises(ValueError, match="connect Load Wan Video Model or WanVideoModelLoader"):
            files_of(value, None, AUTO, Status())


def test_the_only_vae_that_fits_is_found_among_others(loaded: Loaded, folders: Path) -> None:
    (folders / "vae" / "ae.safetensors").write_bytes(b"not a VAE")
    (folders / "vae" / "link.safetensors").symlink_to(folders / "gone")
    assert path_of(files_of(loaded(NAMES.high_noise), None, AUTO, Status()).vae) == NAMES.vae


def test_a_choice_of_vaes_is_the_users(loaded: Loaded, folders: Path) -> None:
    shutil.copy(folders / "vae" / NAMES.vae, folders / "vae" / "b.safetensors")
    with pytest.raises(ValueError, match=rf"2 of them fit: b.safetensors, {NAMES.vae}. Choose one in vae"):
        files_of(loaded(NAMES.high_noise), None, AUTO, Status())
    assert path_of(files_of(loaded(NAMES.high_noise), None, "b.safetensors", Status()).vae) == "b.safetensors"
    for name in ("b.safetensors", NAMES.vae):
        (folders / "vae" / name).unlink()
    with pytest.raises(ValueError, match="with 16 latent channels, but none fits"):
        files_of(loaded(NAMES.high_noise), None, AUTO, Status())
