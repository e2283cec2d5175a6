"""What a CLIP vision model's names and shapes say, under each of its makers' names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import as_official, as_open_clip, clip_weights
from torch import Tensor
from wan_pack.wan.vision import clip_keys
from wan_pack.wan.vision.clip_keys import (
    OFFICIAL,
    OPEN_CLIP,
    TRANSFORMERS,
    ClipInfo,
    Part,
    check_clip_files,
    stored_shape,
)


def checked(folder: Path, tensors: dict[str, Tensor | None]) -> ClipInfo:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(whole, folder / "clip.safetensors")
    return check_clip_files([folder / "clip.safetensors"])


WRITTEN = {
    TRANSFORMERS: (lambda: clip_weights(), "vision_model."),
    OPEN_CLIP: (lambda: as_open_clip(clip_weights()), "visual."),
    OFFICIAL: (lambda: as_official(clip_weights()), "visual."),
}


@pytest.mark.parametrize("naming", WRITTEN)
def test_sizes_are_read_off_the_shapes(tmp_path: Path, naming: str) -> None:
    make, prefix = WRITTEN[naming]
    weights = make()
    info = checked(tmp_path, weights)
    assert (info.dim, info.layers, info.ffn_dim, info.naming) == (64, 3, 64, naming)
    assert info.prefix in (prefix, "") and all(part.tensor.startswith(info.prefix) for part in info.source.values())
    assert {name: stored_shape(name, info) for name in info.source} == {
        name: tuple(weights[part.tensor].shape) for name, part in info.source.items()
    }
    # All but the last layer, whose queries, keys and values lie in thirds of one tensor under two of the names.
    assert len(info.shapes) == 5 + 2 * 16 and not any(".2." in name for name in info.shapes if "layers" in name)
    thirds = [info.source[f"encoder.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"]
    if naming == TRANSFORMERS:
        assert {(part.index, part.of) for part in thirds} == {(0, 1)}
    else:
        assert [(part.index, part.of) for part in thirds] == [(0, 3), (1, 3), (2, 3)]
        assert len({part.tensor for part in thirds}) == 1
        assert info.source["encoder.layers.1.mlp.fc1.bias"] == Part(info.source["encoder.layers.1.mlp.fc1.bias"].tensor)


def layered(count: int) -> dict[str, Tensor | None]:
    """With so many layers, of which each has a tensor."""
    base = {name: tensor for name, tensor in clip_weights().items() if "layers.2." not in name}
    return base | {f"vision_model.encoder.layers.{layer}.x": torch.ones(1) for layer in range(count)}


@pytest.mark.parametrize("count", [1, 101])
def test_a_model_has_two_to_a_hundred_layers(tmp_path: Path, count: int) -> None:
    tensors = layered(count)
    if count == 1:
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    with pytest.raises(ValueError, match=f"a CLIP vision model of {count} layers; it must have 2 to 100"):
        checked(tmp_path, tensors)


def test_two_layers_are_enough_and_a_hundred_not_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: tensor for name, tensor in clip_weights().items() if "layers.2." not in name}
    assert checked(tmp_path, two).layers == 2
    monkeypatch.setattr(clip_keys, "MAX_LAYERS", 3)
    assert checked(tmp_path, clip_weights()).layers == 3
    # What is no number is no layer.
    assert checked(tmp_path, two | {"vision_model.encoder.layers.norm.x": torch.ones(1)}).layers == 2


PATCHES = "vision_model.embeddings.patch_embedding.weight"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({PATCHES: torch.ones(64, 3, 14)}, r"patches are \[3, 14\]; they must be \[3, 14, 14\]"),
        ({PATCHES: torch.ones(64, 4, 14, 14)}, r"patches are \[4, 14, 14\]; they must be \[3, 14, 14\]"),
        ({PATCHES: torch.ones(0, 3, 14, 14)}, r"patches are \[3, 14, 14\]; they must be"),
        ({FC1: torch.ones(0, 64)}, "whose patches are"),
        ({FC1: torch.ones(64)}, "whose patches are"),
        ({FC1: torch.ones(64, 32)}, rf"tensor {FC1} has shape \[64, 32\]; .* call for \[64, 64\]"),
        ({PATCHES: torch.ones(72, 3, 14, 14)}, "of 72 channels; they must divide by 16 heads"),
        (
            {f"vision_model.encoder.layers.{layer}.mlp.fc{i}.bias": None for layer in (1, 0) for i in (2, 1)},
            r"a CLIP vision model that lacks 4 tensors \(vision_model\.encoder\.layers\.0\.mlp\.fc1\.bias, "
            r"vision_model\.encoder\.layers\.0\.mlp\.fc2\.bias, vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias\);",
        ),
        (
            {FC1: torch.ones(64, 64, dtype=torch.int8)},
            rf": tensor {FC1} is int8 without a scale",
        ),
    ],
)  # fmt: skip
def test_shapes_that_fit_no_clip_are_refused(tmp_path: Path, changed: dict[str, Tensor | None], words: str) -> None:
    with pytest.raises(ValueError, match=rf"clip\.safetensors.*{words}"):
        checked(tmp_path, clip_weights() | changed)
