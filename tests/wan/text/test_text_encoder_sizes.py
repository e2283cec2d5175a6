"""What a text encoder's shapes say, and what they may not say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from umt5 import hf_weights, wide_hf_weights, write_gguf
from wan_pack.wan.files.stored_model import open_model
from wan_pack.wan.text import t5_keys
from wan_pack.wan.text.t5_keys import TextEncoderInfo, module_shapes, text_encoder_info

ATTENTION = "encoder.block.0.layer.0.SelfAttention"
BIAS = f"{ATTENTION}.relative_attention_bias.weight"
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


def info(folder: Path, changed: dict[str, Tensor | None], prefix: str = "") -> TextEncoderInfo:
    tensors = {name: tensor for name, tensor in (hf_weights() | changed).items() if tensor is not None}
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return text_encoder_info(open_model([folder / "x.safetensors"], "a model"))


def test_sizes_are_read_off_the_shapes(tmp_path: Path) -> None:
    found = info(tmp_path, {GATE: torch.ones(70, 48), f"{ATTENTION}.q.weight": torch.ones(40, 48)}, "t5.")
    assert found == TextEncoderInfo(48, 300, 2, 4, 10, 70, 32, "t5.", t5_keys.TRANSFORMERS, None)
    shapes = module_shapes(found)
    attention, dense = "encoder.block.1.layer.0.SelfAttention", "encoder.block.1.layer.1.DenseReluDense"
    assert len(shapes) == 2 + 2 * 10
    assert {shapes[f"{attention}.{part}"] for part in "qkv"} == {(40, 48)} and shapes[f"{attention}.o"] == (48, 40)
    assert {shapes[f"{dense}.{part}"] for part in ("wi_0", "wi_1")} == {(70, 48)} and shapes[f"{dense}.wo"] == (48, 70)
    assert shapes[f"{attention}.relative_attention_bias"] == (32, 4) and shapes["shared"] == (300, 48)
    norms = ("encoder.final_layer_norm", "encoder.block.1.layer.0.layer_norm", "encoder.block.0.layer.1.layer_norm")
    assert {shapes[norm] for norm in norms} == {(48,)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({f"{ATTENTION}.q.weight": torch.ones(42, 48)}, "has 42 attention channels and 4 heads; they do not divide"),
        ({BIAS: torch.ones(32)}, rf"tensor {BIAS} of shape \[32\]; it must be a matrix"),
        ({BIAS: torch.ones(32, 0)}, rf"tensor {BIAS} of shape \[32, 0\]; it must be a matrix"),
        ({GATE: torch.ones(2, 2, 2)}, rf"tensor {GATE} of shape \[2, 2, 2\]; it must be a matrix"),
        ({"shared.weight": torch.ones(0, 48)}, r"tensor shared.weight of shape \[0, 48\]; it must be a matrix"),
        ({"spiece_model": torch.ones(0, dtype=torch.uint8)}, r"spiece_model of shape \[0\]; it must be a list of at m"),
        ({"spiece_model": torch.ones(2, 2, dtype=torch.uint8)}, r"spiece_model of shape \[2, 2\]; it must be a list"),
        ({"a.spiece_model": torch.ones(8, dtype=torch.uint8)}, r"a\.spiece_model of shape \[8\]; .* at most 7 bytes"),
        (
            {name: None for name in hf_weights() if "1.layer.1" in name},
            r"is a umT5 text encoder that lacks 4 tensors \(encoder\.block\.1\.layer\.1\.DenseReluDense\.wi_0, "
            r"encoder\.block\.1\.layer\.1\.DenseReluDense\.wi_1, encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\); "
            r"expected a umT5 .*, all of its files",
        ),
        ({BIAS: None, "x": torch.ones(1)}, "expected a umT5 text encoder"),
    ],
)  # fmt: skip
def test_shapes_that_fit_no_encoder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Tensor | None], words: str
) -> None:
    monkeypatch.setattr(t5_keys, "MAX_SPIECE_BYTES", 7)
    with pytest.raises(ValueError, match=rf"x\.safetensors .*{words}"):
        info(tmp_path, changed)


def test_a_tokenizer_of_the_most_bytes_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5_keys, "MAX_SPIECE_BYTES", 7)
    for name in ("spiece_model", "x.y.spiece_model"):
        assert info(tmp_path, {name: torch.ones(7, dtype=torch.uint8)}).spiece_model == name
    assert info(tmp_path, {"spiece_model.other": torch.ones(9, dtype=torch.uint8)}).spiece_model is None


def test_a_t5_lacks_the_bias_of_later_layers_and_nothing_else(tmp_path: Path) -> None:
    whole = wide_hf_weights()
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    for missing, kind in (
        ((bias,), "a T5 text encoder, not a umT5, that lacks 1 tensors"),
        ((bias, "encoder.final_layer_norm.weight"), "a T5 text encoder in GGUF that lacks 2 tensors"),
    ):
        path = tmp_path / "x.gguf"
        write_gguf(path, {name: tensor for name, tensor in whole.items() if name not in missing}, "F16", {})
        with pytest.raises(ValueError, match=rf"x\.gguf is {kind}"):
            text_encoder_info(open_model([path], "a model"))
