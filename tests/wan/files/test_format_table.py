"""Every row of the table of formats in docs/models.md: a file of it is kept as the row says, with its values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from block_formats import store
from checkpoint_formats import Weights, is_quantised, read_model, write_fp8, write_gguf, write_scaled
from mount import ROOT
from safetensors.torch import save_file
from tiny import random_weights
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.eight_bits import rotate_inputs
from wan_pack.wan.model.linear import FP8_PRODUCTS, Linear

CONFIG = WanConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Write = Callable[[Path, Weights], Weights]


def floats(dtype: torch.dtype) -> Write:
    def write(path: Path, weights: Weights) -> Weights:
        stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
        save_file(stored, path)
        return {name: tensor.float() for name, tensor in stored.items()}

    return write


def int8(per_row: bool) -> Write:
    return lambda path, weights: write_scaled(path, weights, torch.int8, scale="weight_scale", per_row=per_row)


WRITERS: dict[str, list[Write]] = {
    "fp32": [floats(torch.float32)],
    "bf16": [floats(torch.bfloat16)],
    "fp16": [floats(torch.float16)],
    "fp8 e4m3fn, e5m2, without scales": [
        lambda path, weights, dtype=dtype: write_fp8(path, weights, "plain", dtype) for dtype in (E4M3, E5M2)
    ],
    "fp8 scaled by tensor (ComfyUI, Kijai)": [
        lambda path, weights, scale=scale: write_fp8(path, weights, f"{scale} by tensor", E4M3)
        for scale in ("weight_scale", "scale_weight")
    ],
    "fp8 scaled by row (LightX2V, quanto, torchao)": [
        lambda path, weights: write_fp8(path, weights, "weight_scale by row", E4M3),
        lambda path, weights: store(path, "torchao fp8", weights),
    ],
    "fp8 scaled by blocks": [lambda path, weights: store(path, "fp8 by squares", weights)],
    "int8 by tensor (ComfyUI)": [int8(per_row=False)],
    "int8 by row (LightX2V, ComfyUI, quanto, torchao)": [
        int8(per_row=True),
        lambda path, weights: store(path, "torchao", weights),
        lambda path, weights: store(path, "quanto", weights),
    ],
    "int8 with ConvRot (ComfyUI)": [lambda path, weights: store(path, "int8 ConvRot", weights)],
    "int8 by blocks": [lambda path, weights: store(path, "int8 by blocks", weights)],
    "int4 with ConvRot (ComfyUI)": [lambda path, weights: store(path, "int4 ConvRot", weights)],
    "w4a8 with ConvRot (ComfyUI)": [lambda path, weights: store(path, "w4a8", weights)],
    "nvfp4": [lambda path, weights: store(path, "nvfp4", weights)],
    "mxfp8": [lambda path, weights: store(path, "mxfp8", weights)],
    "GGUF Q8_0": [lambda path, weights: write_gguf(path, weights, "Q8_0")],
    "GGUF Q4_0": [lambda path, weights: write_gguf(path, weights, "Q4_0")],
}
"""Format as the table names it -> what writes it; returns the values that the file stands for."""
DTYPES = {"bf16": {torch.bfloat16}, "fp8": {E4M3, E5M2}, "int8": {torch.int8}}


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "models.md").read_text()
    table = text.partition("| format | file | in memory |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_row_has_a_test():
    assert [row[0] for row in rows()] == list(WRITERS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_file_is_kept_as_its_row_says(tmp_path: Path, row: list[str]):
    kind, _, full, int8_too = row
    for i, write in enumerate(WRITERS[kind]):
        path = tmp_path / (f"{i}.gguf" if kind.startswith("GGUF") else f"{i}.safetensors")
        values = write(path, random_weights(CONFIG))
        for words, keeping in ((full, Keeping()), (int8_too, Keeping("int8"))):
            model = read_model(path, torch.bfloat16, keeping=keeping)
            form, _, how = words.partition(", ")
            assert how in ("exact", "rounded once"), row
            for name, value in values.items():
                layer = model.get_submodule(name.rpartition(".")[0])
                if not is_quantised(name, value):
                    continue
                assert isinstance(layer, Linear)
                large = any(name.endswith(f".{each}.weight") for each in FP8_PRODUCTS)
                kept = layer.codes
                if form == "int8" and how == "rounded once" and not large:
                    assert kept.dtype == torch.bfloat16 and torch.equal(kept, value.bfloat16()), name
                    continue
                assert kept.dtype in DTYPES[form], (name, words)
                check(layer, value, how == "exact", kept, name)


def check(layer: Linear, value: torch.Tensor, exact: bool, kept: torch.Tensor, name: str) -> None:
    """That the layer's values are those of the file, rounded as the row says."""
    scale = torch.ones(1) if layer.weight_scale is None else layer.weight_scale
    got = kept.float() * scale
    if kept.dtype == torch.int8 and not exact:
        assert torch.equal(scale, value.abs().amax(1, keepdim=True) / 127), name
        assert torch.equal(kept, (value / scale).round().to(torch.int8)), name
    elif layer.kept is not None and layer.kept.rotated_by:
        torch.testing.assert_close(rotate_inputs(got, layer.kept.rotated_by), value, rtol=1e-5, atol=1e-6)
    elif exact:
        assert torch.equal(got, value), name
    else:
        # Values that float32 rounds otherwise may be halfway between two of bf16.
        torch.testing.assert_close(got, value.bfloat16().float(), rtol=2**-8, atol=1e-6)
        assert (got != value.bfloat16().float()).float().mean() < 1e-3, name


def test_the_page_names_what_is_refused():
    from wan_pack.wan.files import quantised

    text = (ROOT / "docs" / "models.md").read_text()
    refused = {*quantised._REFUSED.values(), *quantised._REFUSED_DTYPES.values()}
    for word in ("bitsandbytes", "Nunchaku", "AWQ", "GPTQ", "SDNQ", "HQQ", "zero points", "mxfp4", "mxfp6"):
        assert any(word in name for name in refused), word
        assert re.search(rf"Refused by name:.*{word}", text), word
