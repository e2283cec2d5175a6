"""Which files the loader lists, whatever their format, and what it hands on for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from node_inputs import inputs_of, use_model_folders
from wan_pack.nodes.models import catalogue
from wan_pack.nodes.models.loaders import NONE, LoadWanVideoModel

TRANSFORMER = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`."""
    use_model_folders(tmp_path, monkeypatch)
    return tmp_path


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_config(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": kind}))


def write_diffusers(top: Path) -> None:
    for name in ("transformer", "transformer_2"):
        make(top, f"{name}/{TRANSFORMER}")
        write_config(top / name, "WanTransformer3DModel")
    make(top, f"vae/{TRANSFORMER}", "text_encoder/model.safetensors", "tokenizer/spiece.model")
    write_config(top / "vae", "AutoencoderKLWan")


def test_single_files_of_both_formats_are_listed(folders: Path) -> None:
    make(folders / "diffusion_models", "a.safetensors", "sub/b-HighNoise-Q4_K_M.gguf", "notes.txt")
    assert catalogue.expert_names() == ["a.safetensors", "sub/b-HighNoise-Q4_K_M.gguf"]
    assert catalogue._file("diffusion_models", "sub/b-HighNoise-Q4_K_M.gguf") == (
        folders / "diffusion_models" / "sub" / "b-HighNoise-Q4_K_M.gguf"
    )


def test_a_model_in_parts_is_listed_once_and_is_all_of_them(folders: Path) -> None:
    for ending in ("safetensors", "gguf"):
        parts = [f"wan-{i:05}-of-00003.{ending}" for i in (1, 2, 3)]
        make(folders / "diffusion_models", *parts)
        assert [name for name in catalogue.expert_names() if name.endswith(ending)] == parts[:1]
        assert [path.name for path in catalogue.expert_files(parts[0])] == parts
        (folders / "diffusion_models" / parts[2]).unlink()
        with pytest.raises(
            ValueError, match=rf"is one of 3 parts of a model; beside it is no wan-00003-of-00003\.{ending}"
        ):
            catalogue.expert_files(parts[0])


def test_gguf_vaes_are_listed(folders: Path) -> None:
    make(folders / "vae", "wan_2.1_vae.safetensors", "pig/wan_2.1_vae_fp32-f16.gguf")
    assert catalogue.vae_names() == ["wan_2.1_vae.safetensors", "pig/wan_2.1_vae_fp32-f16.gguf"]
    assert catalogue.vae_files("pig/wan_2.1_vae_fp32-f16.gguf") == (
        folders / "vae" / "pig" / "wan_2.1_vae_fp32-f16.gguf",
    )


def test_all_in_one_checkpoint_is_listed_everywhere(folders: Path) -> None:
    make(folders / "checkpoints", "rapid.safetensors", "old.ckpt")
    name = "checkpoints/rapid.safetensors"
    assert catalogue.expert_names() == catalogue.vae_names() == catalogue.text_encoder_names() == [name]
    file = folders / "checkpoints" / "rapid.safetensors"
    assert catalogue.expert_files(name) == catalogue.vae_files(name) == (file,)
    assert catalogue.text_encoder_files(name) == ((file,), ())


def test_a_subfolder_called_checkpoints_keeps_its_own_files(folders: Path) -> None:
    make(folders, "checkpoints/x.safetensors", "diffusion_models/checkpoints/x.safetensors")
    assert catalogue.expert_names() == ["checkpoints/x.safetensors"]
    assert catalogue.expert_files("checkpoints/x.safetensors") == (
        folders / "diffusion_models" / "checkpoints" / "x.safetensors",
    )


@pytest.mark.parametrize("key", catalogue.FOLDER_KEYS)
def test_diffusers_folder_gives_transformers_vae_and_text_encoder(folders: Path, key: str) -> None:
    top = folders / key / "Wan2.2-T2V-A14B-Diffusers"
    write_diffusers(top)
    name = top.name
    assert catalogue.expert_names() == [f"{name}/transformer", f"{name}/transformer_2"]
    assert f"{name}/vae" in catalogue.vae_names()
    assert f"{name}/text_encoder" in catalogue.text_encoder_names()
    assert catalogue.expert_files(f"{name}/transformer_2") == (top / "transformer_2" / TRANSFORMER,)
    assert catalogue.vae_files(f"{name}/vae") == (top / "vae" / TRANSFORMER,)
    files, tokenizer = catalogue.text_encoder_files(f"{name}/text_encoder")
    assert files == (top / "text_encoder" / "model.safetensors",)
    assert tokenizer == (top / "tokenizer" / "spiece.model",)


def test_clip_is_listed_where_it_is(folders: Path) -> None:
    """Single files, beside an official model, and in a diffusers folder, whose file is no transformer."""
    make(folders / "clip_vision", "clip_vision_h.safetensors")
    official = folders / "wan" / "Wan2.1-I2V-14B-480P"
    make(official, TRANSFORMER, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    write_config(official, "WanModel")
    top = folders / "diffusion_models" / "Wan2.1-I2V-Diffusers"
    write_diffusers(top)
    make(top, "image_encoder/model.safetensors")
    of_official = "Wan2.1-I2V-14B-480P/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    of_diffusers = "Wan2.1-I2V-Diffusers/image_encoder"
    assert catalogue.clip_vision_names() == ["clip_vision_h.safetensors", of_official, of_diffusers]
    assert catalogue.clip_vision_files(of_official) == (official / Path(of_official).name,)
    assert catalogue.clip_vision_files(of_diffusers) == (top / "image_encoder" / "model.safetensors",)
    single = catalogue.clip_vision_files("clip_vision_h.safetensors")
    assert single == (folders / "clip_vision" / "clip_vision_h.safetensors",)
    assert not any("image_encoder" in name for name in catalogue.expert_names())
    assert inputs_of(LoadWanVideoModel)["clip_vision"][0] == [NONE, *catalogue.clip_vision_names()]


def test_official_5b_folder_is_one_transformer_with_its_vae(folders: Path) -> None:
    top = folders / "wan" / "Wan2.2-TI2V-5B"
    make(top, TRANSFORMER, "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model")
    write_config(top, "WanModel")
    assert catalogue.expert_names() == ["Wan2.2-TI2V-5B"]
    assert catalogue.expert_files("Wan2.2-TI2V-5B") == (top / TRANSFORMER,)
    assert catalogue.vae_names() == ["Wan2.2-TI2V-5B/Wan2.2_VAE.pth"]
    assert catalogue.vae_files("Wan2.2-TI2V-5B/Wan2.2_VAE.pth") == (top / "Wan2.2_VAE.pth",)
    _, tokenizer = catalogue.text_encoder_files("Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.pth")
    assert tokenizer == (top / "google" / "umt5-xxl" / "spiece.model",)


def test_files_of_a_kind_are_listed_by_name(folders: Path) -> None:
    names = ["a.gguf", "b/a.gguf", "b/c.gguf", "b/z/a.gguf", "c.gguf", "d.gguf"]
    for key in ("diffusion_models", "vae", "text_encoders"):
        make(folders / key, *names[::-1], *names)
    assert catalogue.expert_names() == catalogue.vae_names() == catalogue.text_encoder_names() == names
    kinds = (
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    )
    for home in ("c", "a", "b"):
        make(folders / "wan", f"{home}/high_noise_model/{TRANSFORMER}", *(f"{home}/{kind}" for kind in kinds))
        write_config(folders / "wan" / home / "high_noise_model", "WanModel")
    assert catalogue.expert_names()[-3:] == [f"{home}/high_noise_model" for home in "abc"]
    listed = catalogue.vae_names()[6:], catalogue.text_encoder_names()[6:], catalogue.clip_vision_names()
    for found, kind in zip(listed, kinds, strict=True):
        assert found == [f"{home}/{kind}" for home in "abc"]


def test_folders_of_other_models_are_not_listed(folders: Path) -> None:
    write_config(folders / "diffusers" / "no files" / "transformer", "WanTransformer3DModel")
    make(folders / "diffusers", f".hidden/transformer/{TRANSFORMER}", f"too/deep/in/{TRANSFORMER}")
    for hidden in (".hidden/transformer", "too/deep/in"):
        write_config(folders / "diffusers" / hidden, "WanTransformer3DModel")
    make(folders / "diffusers", f"Flux/transformer/{TRANSFORMER}", f"damaged/transformer/{TRANSFORMER}")
    write_config(folders / "diffusers" / "Flux" / "transformer", "FluxTransformer2DModel")
    (folders / "diffusers" / "damaged" / "transformer" / "config.json").write_text("[" * 100_000)
    assert catalogue.expert_names() == []


@pytest.mark.parametrize(
    ("files", "high", "low"),
    [
        (["wan2.2_t2v_high_noise_14B.safetensors", "wan2.2_t2v_low_noise_14B.safetensors"], 0, 1),
        (["Wan2_2-T2V-A14B-LOW_fp8.safetensors", "Wan2_2-T2V-A14B_HIGH_fp8.safetensors"], 1, 0),
        (["wan2.2_ti2v_5B_fp16.safetensors"], 0, None),
    ],
)
def test_each_slot_prefers_the_expert_of_its_name(folders: Path, files: list[str], high: int, low: int | None) -> None:
    make(folders / "diffusion_models", *files)
    names = sorted(files)
    inputs = inputs_of(LoadWanVideoModel)
    assert inputs["high_noise"][0] == inputs["low_noise"][0] == [*names, NONE]
    assert inputs["high_noise"][1]["default"] == files[high]
    assert inputs["low_noise"][1]["default"] == (NONE if low is None else files[low])


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["clip_l.safetensors", "umt5_xxl_fp16.safetensors"], "umt5_xxl_fp16.safetensors"),
        (["UMT5-xxl-encoder-Q8_0.gguf"], "UMT5-xxl-encoder-Q8_0.gguf"),
        (["umt5-xxl-encoder-Q3_K_S.gguf", "umt5-xxl-encoder-Q8_0.gguf"], "umt5-xxl-encoder-Q8_0.gguf"),
        (["umt5_xxl_fp8_e4m3fn_scaled.safetensors", "umt5-xxl-enc-bf16.safetensors"], "umt5-xxl-enc-bf16.safetensors"),
        (["umt5_xxl_fp32.safetensors", "umt5-xxl-Q5_K_M.gguf"], "umt5-xxl-Q5_K_M.gguf"),
        (["t5xxl_fp16.safetensors", "umt5_small.safetensors"], NONE),
        ([], NONE),
    ],
)
def test_a_new_loader_has_the_encoder_that_a_prompt_needs(folders: Path, files: list[str], chosen: str) -> None:
    make(folders / "text_encoders", *files)
    names, options = inputs_of(LoadWanVideoModel)["text_encoder"]
    assert options["default"] == chosen and set(names) == {NONE, *files}


def test_loader_runs_again_when_a_file_was_replaced(folders: Path) -> None:
    make(folders, "diffusion_models/a.safetensors", "vae/v.safetensors")
    names = {"high_noise": "a.safetensors", "low_noise": NONE, "vae": "v.safetensors", "text_encoder": NONE}
    before = LoadWanVideoModel.IS_CHANGED(**names)
    assert LoadWanVideoModel.IS_CHANGED(**names, high_noise_lora=None) == before != ""
    (folders / "vae" / "v.safetensors").write_bytes(b"new")
    assert LoadWanVideoModel.IS_CHANGED(**names) != before
    assert LoadWanVideoModel.IS_CHANGED(**{**names, "vae": None}) == ""


def test_a_model_without_a_transformer_is_refused(folders: Path) -> None:
    make(folders, "vae/v.safetensors")
    with pytest.raises(ValueError, match="high_noise and low_noise are both none"):
        LoadWanVideoModel().load(NONE, NONE, "v.safetensors")
