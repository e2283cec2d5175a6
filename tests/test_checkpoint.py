"""Every layout loads to the same tensors; every wrong file is named before anything starts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, random_weights, write_official
from wan_pack.distributed.weights import load_weights
from wan_pack.wan.checkpoint import INDEX_NAME, Checkpoint, checkpoint_files
from wan_pack.wan.config import WanConfig
from wan_pack.wan.model import meta_model, parameter_dtype

SINGLE = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
"""One head of 128 channels: what a file without a config.json must have."""


def loaded(path: Path, compute: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(checkpoint_files(path))
    model = meta_model(checkpoint.config, compute)
    load_weights(model, checkpoint, device=torch.device("cpu"))
    return model.state_dict()


def single_file(path: Path, weights: dict[str, torch.Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor for name, tensor in weights.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_loads_to_the_same_tensors(tmp_path: Path, dtype: torch.dtype):
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(SINGLE).items()}
    paths = [
        write_official(tmp_path / "one", weights, SINGLE),
        write_official(tmp_path / "sharded", weights, SINGLE, shards=3),
        single_file(tmp_path / "plain.safetensors", weights),
        single_file(tmp_path / "prefixed.safetensors", weights, "model.diffusion_model."),
    ]
    for path in paths:
        for name, tensor in loaded(path).items():
            assert torch.equal(tensor, weights[name].float()), (path, name)


def test_weights_are_cast_by_the_precision_policy(tmp_path: Path):
    weights = random_weights(SINGLE)
    for name, tensor in loaded(single_file(tmp_path / "w.safetensors", weights), torch.bfloat16).items():
        assert torch.equal(tensor, weights[name].to(parameter_dtype(name, torch.bfloat16))), name


def test_heads_come_from_config_json(tmp_path: Path):
    assert Checkpoint(checkpoint_files(write_official(tmp_path / "t", random_weights()))).config == TINY
    (tmp_path / "t" / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": "many"}))
    with pytest.raises(ValueError, match=r"config.json: num_heads is 'many'"):
        Checkpoint(checkpoint_files(tmp_path / "t"))


def refused(path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Checkpoint([single_file(path, tensors)])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"vace_patch_embedding.weight": (4,)}, "VACE"),
        ({"control_adapter.conv.weight": (4,)}, "Fun-Control"),
        ({"audio_injector.x": (4,)}, "S2V"),
        ({"face_adapter.x": (4,)}, "Animate"),
        ({"img_emb.proj.0.bias": (4,)}, r"Wan2\.1 I2V"),
        ({"patch_embedding.weight": (128, 36, 1, 2, 2)}, "I2V transformer"),
        ({"patch_embedding.weight": (128, 48, 1, 2, 2)}, "TI2V-5B"),
        ({"patch_embedding.weight": (128, 32, 1, 2, 2)}, "32 input channels"),
        ({"blocks.0.ffn.0.surprise": (4,)}, "1 are unknown.*surprise"),
        ({"blocks.1.ffn.0.bias": (81,)}, r"blocks\.1\.ffn\.0\.bias has shape \(81,\); expected \(80,\)"),
    ],
)
def test_other_transformers_are_refused_by_name(tmp_path: Path, extra: dict[str, tuple[int, ...]], words: str):
    weights = random_weights(SINGLE) | {name: torch.zeros(shape) for name, shape in extra.items()}
    refused(tmp_path / "model.safetensors", weights, words)


def test_other_files_are_refused_by_name(tmp_path: Path, golden_folder: Path):
    refused(tmp_path / "x.safetensors", {"blocks.0.ffn.0.lora_down.weight": torch.zeros(4, 4)}, "a LoRA")
    for case, words in (("vae_wan21/vae", "VAE"), ("t5_encoder/text_encoder", "umT5 text encoder")):
        refused(tmp_path / "y.safetensors", load_file(golden_folder / case / "model.safetensors"), words)
    weights = random_weights(SINGLE)
    missing = {name: tensor for name, tensor in weights.items() if "blocks.1.ffn" not in name}
    refused(tmp_path / "z.safetensors", missing, "4 tensors are missing.*blocks.1.ffn.0.bias")
    fp8 = {n: t.to(torch.float8_e4m3fn) if n.endswith("ffn.0.weight") else t for n, t in weights.items()}
    refused(tmp_path / "fp8.safetensors", fp8, "F8_E4M3")


def test_a_truncated_file_is_named(tmp_path: Path):
    path = single_file(tmp_path / "cut.safetensors", random_weights(SINGLE))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors is truncated"):
        Checkpoint([path])


def test_a_file_that_shrinks_later_is_an_error_not_garbage(tmp_path: Path):
    path = single_file(tmp_path / "shrinks.safetensors", random_weights(SINGLE))
    checkpoint = Checkpoint([path])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=r"shrinks.safetensors ended at byte"):
        load_weights(meta_model(SINGLE, torch.float32), checkpoint, device=torch.device("cpu"))


def test_damaged_indexes_are_named(tmp_path: Path):
    folder = write_official(tmp_path / "sharded", random_weights(), shards=2)
    for content, words in (
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "not a file in"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ("[" * 100_000, "cannot be read as JSON"),
    ):
        (folder / INDEX_NAME).write_text(content)
        with pytest.raises(ValueError, match=words):
            checkpoint_files(folder)
    with pytest.raises(ValueError, match="holds neither"):
        checkpoint_files(tmp_path)
    with pytest.raises(ValueError, match=r"expected a \.safetensors"):
        checkpoint_files(tmp_path / "model.ckpt")


def test_mutated_headers_only_raise_value_error(tmp_path: Path):
    path = single_file(tmp_path / "fuzz.safetensors", random_weights(SINGLE))
    good = path.read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    for seed in range(1500):
        rng = random.Random(seed)
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(header_end)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            Checkpoint([path])
        except ValueError as error:
            assert "fuzz.safetensors" in str(error), f"seed {seed}"
