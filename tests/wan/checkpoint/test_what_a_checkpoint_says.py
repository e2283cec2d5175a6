"""What stands beside a transformer and in it: its config, tensors that are too many or too few, and who reads which."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_formats import write_scaled
from safetensors.torch import save_file
from single_files import SINGLE
from tiny import TINY, TINY_VACE, random_weights, write_official
from torch import Tensor, nn
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.checkpoint.weights import empty_model, owners, read_weights, take_memory
from wan_pack.wan.model.linear import FP8_PRODUCTS


def opened(folder: Path, says: object, weights: dict[str, Tensor] | None = None) -> Checkpoint:
    folder = write_official(folder, random_weights() if weights is None else weights)
    (folder / "config.json").write_text(json.dumps(says))
    return Checkpoint(checkpoint_files(folder))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("WanModel", "num_heads"),
        ("VaceWanModel", "num_heads"),
        ("WanAnimateModel", "num_heads"),
        ("WanTransformer3DModel", "num_attention_heads"),
        ("WanVACETransformer3DModel", "num_attention_heads"),
        ("WanAnimateTransformer3DModel", "num_attention_heads"),
    ],
)
def test_a_config_says_the_heads_by_its_classs_word(tmp_path: Path, name: str, key: str) -> None:
    """One head is enough; a file of 32 channels alone says no number."""
    for heads in (1, 2, 4):
        assert opened(tmp_path, {"_class_name": name, key: heads}).config.num_heads == heads
    other = {"num_heads": "num_attention_heads", "num_attention_heads": "num_heads"}[key]
    for says, words in (
        ({"_class_name": name, other: 4}, f"{key} is None; it must be a positive number"),
        ({"_class_name": name, key: 0}, f"{key} is 0; it must be a positive number"),
        ({"_class_name": name, key: True}, f"{key} is True; it must be a positive number"),
        ({"_class_name": "Another", key: 4}, "without a config"),
        ({key: 4}, "without a config"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(tmp_path, says)


def test_a_config_says_behind_which_blocks_vaces_are(tmp_path: Path) -> None:
    weights, says = random_weights(TINY_VACE), {"_class_name": "VaceWanModel", "num_heads": 4}
    assert opened(tmp_path, says | {"vace_layers": [0, 3]}, weights).config == TINY_VACE
    for layers in ([0, "3"], [True, 3], "03", {"0": 3}):
        with pytest.raises(
            ValueError, match=r"config\.json: vace_layers is .*; it must be a list of numbers of blocks"
        ):
            opened(tmp_path, says | {"vace_layers": layers}, weights)


@pytest.mark.parametrize("layers", [(0,), (0, 1), (0, 1, 2)])
def test_any_number_of_vaces_blocks_is_whole(tmp_path: Path, layers: tuple[int, ...]) -> None:
    config = replace(TINY_VACE, num_layers=3, vace_layers=layers)
    weights = random_weights(config)
    says = {"_class_name": "VaceWanModel", "num_heads": 4, "vace_layers": list(layers)}
    checkpoint = opened(tmp_path, says, weights)
    assert checkpoint.config == config
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for block in range(len(layers)):
        name = f"vace_blocks.{block}.norm3.weight"
        with pytest.raises(ValueError, match=rf"not a whole VACE transformer: 1 tensors are missing \({name}\)"):
            opened(tmp_path, says, {key: tensor for key, tensor in weights.items() if key != name})


def test_five_of_the_tensors_are_named(tmp_path: Path) -> None:
    weights = random_weights(SINGLE)
    extra = {f"blocks.0.{letter}": torch.ones(2) for letter in "gfedcba"}
    named = ", ".join(f"blocks.0.{letter}" for letter in "abcde")
    save_file(weights | extra, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf"and 7 tensors that are unknown \({named}\): it is another model"):
        Checkpoint([tmp_path / "m.safetensors"])
    less = {name: tensor for name, tensor in weights.items() if "blocks.1.ffn" not in name and "norm3" not in name}
    missing = sorted(weights.keys() - less.keys())
    save_file(less, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf": {len(missing)} tensors are missing \({', '.join(missing[:5])}\)$"):
        Checkpoint([tmp_path / "m.safetensors"])


def test_a_file_of_another_kind_is_named_by_its_ending(tmp_path: Path) -> None:
    for name, kind in (("model", "file without suffix"), ("model.bin", r"\.bin"), ("model.Ckpt", r"\.Ckpt")):
        with pytest.raises(ValueError, match=rf"{name} is a {kind}; expected a \.safetensors or \.gguf file"):
            checkpoint_files(tmp_path / name)
    for name in ("model.SAFETENSORS", "model.GGUF"):
        assert checkpoint_files(tmp_path / name) == (tmp_path / name,)


def test_folders_of_experts_are_offered_in_order(tmp_path: Path) -> None:
    names = ("high_noise_model", "low_noise_model", "transformer", "transformer_2")
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"choose one of its folders {', '.join(names)}"):
        checkpoint_files(tmp_path)


def test_the_log_counts_what_is_kept(tmp_path: Path) -> None:
    path, weights = tmp_path / "m.safetensors", random_weights(SINGLE)
    values = {name: tensor.bfloat16() if "blocks.1" in name else tensor for name, tensor in weights.items()}
    values["head.head.weight"] = values["head.head.weight"].half()
    save_file(values, path)
    kinds = Counter(tensor.dtype for tensor in values.values() if tensor.dim() > 1)
    checkpoint = Checkpoint([path])
    told = f"{path}: {kinds[torch.float32]} weights in F32, {kinds[torch.bfloat16]} weights in BF16, 1 weights in F16"
    assert kinds[torch.float32] > kinds[torch.bfloat16] and checkpoint.describe() == told
    large = 2 * len(FP8_PRODUCTS)
    for precision in ("fp8", "int8"):
        kept = Keeping(precision).weights(checkpoint)
        told_kept = f"{told}; {large} of them become {precision} in memory, {large} with scales"
        assert checkpoint.describe(kept) == told_kept
    write_scaled(path, weights, torch.int8, scale="weight_scale", per_row=True)
    checkpoint = Checkpoint([path])
    assert checkpoint.describe(Keeping("int8").weights(checkpoint)).endswith(
        "weights in F32; 20 of them stay int8 in memory, 20 with scales"
    )


def parameters(**sizes: int) -> nn.Module:
    """Of so many bytes each, by name: "a_weight" for a.weight."""
    named = {name.replace("_", ".", 1): SimpleNamespace(nbytes=nbytes) for name, nbytes in sizes.items()}
    return SimpleNamespace(named_parameters=named.items)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        ({"a_weight": 5, "b_weight": 5, "c_weight": 5}, 1, [0, 0, 0]),
        ({"a_weight": 5, "b_weight": 2, "c_weight": 2, "d_weight": 2, "e_weight": 9}, 2, [0, 1, 1, 1, 0]),
        ({"a_weight": 9, "b_weight": 5, "c_weight": 6, "d_weight": 1}, 3, [0, 1, 2, 1]),
        ({"a_weight": 4, "a_weight_scale": 100, "b_weight": 3, "c_weight": 1, "d_weight": 1}, 2, [0, 0, 1, 1, 0]),
    ],
)
def test_bytes_are_shared_out_a_weight_with_its_scale(sizes: dict[str, int], parts: int, expected: list[int]) -> None:
    model = parameters(**sizes)
    names = [name.replace("_", ".", 1) for name in sizes]
    assert owners(model, None, parts) == dict(zip(names, expected, strict=True))
    assert owners(model, names[1:2], parts) == {names[1]: 0}


def test_what_takes_the_place_of_what_is_told(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    told: list[tuple[Tensor, Tensor]] = []
    before = [*module.parameters(), *module.buffers()]
    take_memory(module, torch.device("cpu"), then=lambda old, new: told.append((old, new)))
    assert {id(old) for old, _ in told} >= {id(tensor) for tensor in module.buffers()} - {id(new) for _, new in told}
    assert all((old.shape, old.dtype) == (new.shape, new.dtype) and new.device.type == "cpu" for old, new in told)
    assert len(told) == len(before) == 7
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 2))
    take_memory(module, torch.device("cpu"), recurse=False)
    assert next(module.parameters()).is_meta


def test_a_part_of_the_work_is_read(tmp_path: Path) -> None:
    """Of three that share it, and none of it twice."""
    config = replace(TINY, num_layers=1)
    weights = random_weights(config)
    checkpoint = Checkpoint(checkpoint_files(write_official(tmp_path, weights, config)))

    seen: Counter[str] = Counter()
    for part in range(3):
        model = empty_model(checkpoint, torch.float32).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(99)
        told: list[tuple[int, int]] = []
        read_weights(
            model,
            checkpoint,
            device=torch.device("cpu"),
            part=part,
            parts=3,
            on_tensor=lambda *at, to=told: to.append(at),
        )
        read = [name for name, parameter in model.named_parameters() if not (parameter == 99).all()]
        assert told == [(i + 1, len(read)) for i in range(len(read))]
        assert all(torch.equal(model.get_parameter(name).data, weights[name]) for name in read)
        seen.update(read)
    assert seen == Counter(weights.keys())
