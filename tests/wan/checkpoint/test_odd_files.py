"""Files that are a whole transformer with something about them: marks, other prefixes, variants, quanto's names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_formats import write_gguf
from safetensors.torch import save_file
from single_files import SINGLE, loaded, refused, single_file
from tiny import TINY, random_weights, write_official
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.checkpoint.weights import empty_model, read_weights

MARKS = {
    "model_type.SkyReels-V2-T2V-14B-540P": torch.zeros(1),
    "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    "version": torch.tensor(3),
    "format.flag": torch.tensor([True]),
    "empty": torch.zeros(0),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_mark_beside_a_whole_transformer_is_not_in_its_way(tmp_path: Path, name: str):
    weights = random_weights(SINGLE)
    path = single_file(tmp_path / "m.safetensors", {**weights, name: MARKS[name]})
    checkpoint = Checkpoint([path])
    assert checkpoint.shapes.keys() == weights.keys()
    for key, tensor in loaded(path, torch.float32).items():
        assert torch.equal(tensor, weights[key]), key


def test_one_number_inside_of_a_module_is_no_mark(tmp_path: Path):
    refused(
        tmp_path / "gated.safetensors",
        {**random_weights(SINGLE), "blocks.0.cross_attn.gate": torch.ones(1)},
        r"a whole T2V transformer and 1 tensors that are unknown \(blocks\.0\.cross_attn\.gate\)",
    )


@pytest.mark.parametrize("variant", ["bf16", "fp16", "fp8_e4m3fn"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("inside", [True, False], ids=["variant inside", "variant last"])
def test_diffusers_folders_with_a_variant_in_the_names(tmp_path: Path, variant: str, shards: int, inside: bool):
    weights = random_weights()
    folder = write_official(tmp_path / "transformer", weights, shards=shards)
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace("_model", f"_model.{variant}", 1).replace("__", "_")))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if shards > 1:
        text = index.read_text().replace("diffusion_pytorch_model-", f"diffusion_pytorch_model.{variant}-")
        index.unlink()
        name = f"{variant}.safetensors.index" if inside else f"safetensors.index.{variant}"
        (folder / f"diffusion_pytorch_model.{name}.json").write_text(text)
    files = checkpoint_files(folder)
    assert len(files) == shards and all(f".{variant}" in file.name for file in files)
    assert Checkpoint(files).config == TINY
    # Full precision is preferred where both are there.
    write_official(folder, weights)
    assert [file.name for file in checkpoint_files(folder)] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("prefix", ["net.", "module.model.", "model.diffusion_model._orig_mod.", "my.high.dit."])
def test_unusual_prefixes_are_found(tmp_path: Path, prefix: str):
    weights = random_weights(SINGLE)
    named = {prefix + name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in weights.items()}
    path = single_file(tmp_path / "m.safetensors", {**named, "vae.other.weight": torch.zeros(2)})
    for key, tensor in loaded(path, torch.float32).items():
        assert torch.equal(tensor, weights[key]), key
    both = {f"{side}.{name}": tensor.clone() for side in ("high", "low") for name, tensor in weights.items()}
    refused(tmp_path / "two.safetensors", both, r"it is several transformers, low\., high\.; expected")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quanto_files_are_read(tmp_path: Path, dtype: torch.dtype):
    tensors, expected = {}, random_weights(SINGLE)
    for name, tensor in random_weights(SINGLE).items():
        if not (name.startswith("blocks.") and tensor.dim() == 2):
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(dim=1, keepdim=True) / (127 if dtype == torch.int8 else 448)
        codes = (tensor / scale).round().to(dtype) if dtype == torch.int8 else (tensor / scale).to(dtype)
        layer = name.removesuffix(".weight")
        tensors |= {f"{name}._data": codes, f"{name}._scale": scale}
        tensors |= {f"{layer}.{end}": torch.ones(()) for end in ("input_scale", "output_scale")}
        expected[name] = codes.float() * scale
    path = single_file(tmp_path / "q.safetensors", tensors)
    checkpoint, device = Checkpoint([path]), torch.device("cpu")
    model = empty_model(checkpoint, torch.float32, ()).to_empty(device=device)
    read_weights(model, checkpoint, device=device)
    for name, parameter in model.named_parameters():
        if name in expected:
            layer = model.get_submodule(name.rpartition(".")[0])
            got = layer.unpacked_weight() if parameter.dtype.itemsize == 1 else parameter
            assert torch.equal(got, expected[name]), name
    shifted = {**tensors, "blocks.0.self_attn.q.weight._shift": torch.zeros(128, 1)}
    refused(tmp_path / "four.safetensors", shifted, r"quantised as quanto with zero points")


def test_unknown_and_missing_tensors_are_named_in_order(tmp_path: Path):
    more = {f"blocks.0.{name}.weight": torch.ones(2) for name in ("zeta", "alpha", "mu")}
    refused(
        tmp_path / "more.safetensors",
        {**random_weights(SINGLE), **more},
        r"3 tensors that are unknown \(blocks\.0\.alpha\.weight, blocks\.0\.mu\.weight, blocks\.0\.zeta\.weight\)",
    )
    less = {name: tensor for name, tensor in random_weights(SINGLE).items() if not name.startswith("blocks.0.norm3")}
    refused(tmp_path / "less.safetensors", less, r"missing \(blocks\.0\.norm3\.bias, blocks\.0\.norm3\.weight\)")
    refused(tmp_path / "none.safetensors", {n: torch.ones(1) for n in "cab"}, "a file of 3 tensors such as a, b, c")


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_a_part_of_a_model_stands_for_all_of_them(tmp_path: Path, ending: str):
    config = replace(SINGLE, dim=256, num_heads=2)
    weights, values = random_weights(config), {}
    for i in range(3):
        part = {name: weights[name] for name in sorted(weights)[i::3]}
        path = tmp_path / f"wan-{i + 1:05}-of-00003.{ending}"
        values |= write_gguf(path, part, "Q8_0") if ending == "gguf" else part
        if ending == "safetensors":
            save_file(part, path)
    for i in (1, 3):
        got = loaded(tmp_path / f"wan-{i:05}-of-00003.{ending}")
        assert got.keys() == weights.keys()
        assert all(torch.equal(got[name], value) for name, value in values.items())
