"""Which model files the loader shows and hands on."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_inputs import inputs_of
from wan_pack.demo.tiny_model import write_comfyui_files, write_official_folder
from wan_pack.nodes.host import host
from wan_pack.nodes.models.loaders import LoadWanVideoModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    write_comfyui_files(models)
    write_official_folder(models / "wan" / "Wan2.2-T2V-A14B")
    return models


@pytest.fixture
def loader_folders(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "model_folders", lambda key: [tiny / key])
    monkeypatch.setattr(
        host,
        "model_files",
        lambda key: sorted(path.name for path in (tiny / key).iterdir()) if (tiny / key).is_dir() else [],
    )
    monkeypatch.setattr(host, "model_path", lambda key, name: tiny / key / name)
    return tiny


def test_official_folders_are_listed_beside_files(loader_folders: Path) -> None:
    inputs = inputs_of(LoadWanVideoModel)
    experts, options = inputs["high_noise"]
    assert experts == [
        "tiny_wan2.2_t2v_high_noise.safetensors",
        "tiny_wan2.2_t2v_low_noise.safetensors",
        "Wan2.2-T2V-A14B/high_noise_model",
        "Wan2.2-T2V-A14B/low_noise_model",
        "none",
    ]
    assert options["default"] == experts[0]
    assert inputs["low_noise"][1]["default"] == experts[1]
    assert inputs["vae"][0] == ["tiny_wan_2.1_vae.safetensors", "Wan2.2-T2V-A14B/Wan2.1_VAE.pth"]
    assert inputs["text_encoder"][0] == [
        "none",
        "tiny_umt5.safetensors",
        "Wan2.2-T2V-A14B/models_t5_umt5-xxl-enc-bf16.pth",
    ]


def test_official_folder_gives_every_shard_and_the_tokenizer(loader_folders: Path) -> None:
    folder = "Wan2.2-T2V-A14B"
    (model,) = LoadWanVideoModel().load(
        f"{folder}/high_noise_model",
        f"{folder}/low_noise_model",
        f"{folder}/Wan2.1_VAE.pth",
        f"{folder}/models_t5_umt5-xxl-enc-bf16.pth",
    )
    assert [Path(part.path).name for part in model.high_noise] == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    assert [Path(part.path).name for part in model.tokenizer] == ["spiece.model"]


def test_missing_shard_is_named(loader_folders: Path) -> None:
    folder = loader_folders / "wan" / "Wan2.2-T2V-A14B" / "low_noise_model"
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    hidden = shard.rename(shard.with_suffix(".hidden"))
    try:
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model-00002-of-00002.safetensors"):
            LoadWanVideoModel().load(
                "tiny_wan2.2_t2v_high_noise.safetensors",
                "Wan2.2-T2V-A14B/low_noise_model",
                "tiny_wan_2.1_vae.safetensors",
            )
    finally:
        hidden.rename(shard)


def test_loader_runs_again_when_a_file_changes(loader_folders: Path) -> None:
    names = {
        "high_noise": "tiny_wan2.2_t2v_high_noise.safetensors",
        "low_noise": "tiny_wan2.2_t2v_low_noise.safetensors",
        "vae": "tiny_wan_2.1_vae.safetensors",
    }
    before = LoadWanVideoModel.IS_CHANGED(**names)
    assert LoadWanVideoModel.IS_CHANGED(**names) == before
    (loader_folders / "vae" / names["vae"]).touch()
    assert LoadWanVideoModel.IS_CHANGED(**names) != before


def test_wrong_kind_of_file_is_refused(loader_folders: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny_wan2\.2_t2v_low_noise\.safetensors.*VAE"):
        wrong = loader_folders / "vae" / "tiny_wan2.2_t2v_low_noise.safetensors"
        wrong.write_bytes((loader_folders / "diffusion_models" / wrong.name).read_bytes())
        try:
            LoadWanVideoModel().load("tiny_wan2.2_t2v_high_noise.safetensors", wrong.name, wrong.name)
        finally:
            wrong.unlink()
