"""One quantised model in the spellings that converters of 2026 give it: the same values, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from block_formats import FORMATS, blocks, convrot
from checkpoint_formats import comfy_quant, is_quantised, quantised_layers, read_model
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.files.diffusers_keys import to_official
from wan_pack.wan.model.config import WanConfig

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Stored = tuple[dict[str, Tensor], Tensor]
"""What is behind a layer's name, and the values of its weight."""
GROUP = 16


def scaled(dtype: torch.dtype, rows: bool = True) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()
        scale = largest / {torch.int8: 127, E4M3: 448, E5M2: 57344}[dtype]
        codes = (weight / scale).round().to(dtype) if dtype == torch.int8 else (weight / scale).to(dtype)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale

    return store


def said(store: Callable[[Tensor], Stored], **entry: object) -> Callable[[Tensor], Stored]:
    """With this in `comfy_quant`."""

    def with_it(weight: Tensor) -> Stored:
        stored, values = store(weight)
        return stored | {"comfy_quant": comfy_quant(**entry)}, values

    return with_it


def written(
    path: Path,
    store: Callable[[Tensor], Stored],
    *,
    rename: Callable[[str], str] = str,
    more: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    config: WanConfig = CONFIG,
) -> dict[str, Tensor]:
    """Returns the values."""
    tensors, values = dict(more or {}), {}
    for name, tensor in random_weights(config).items():
        stored, values[name] = {"weight": tensor}, tensor
        layer, _, leaf = name.rpartition(".")
        if is_quantised(name, tensor):
            stored, values[name] = store(tensor)
        elif leaf != "weight":
            stored = {leaf: tensor}
        tensors |= {rename(f"{layer}.{part}"): value.clone() for part, value in stored.items()}
    save_file(tensors, path, metadata=metadata)
    return values


def check(path: Path, values: dict[str, Tensor], close: float = 1e-6) -> None:
    model = read_model(path, torch.float32)
    for name, parameter in model.named_parameters():
        if name in values:
            layer = model.get_submodule(name.rpartition(".")[0])
            got = layer.unpacked_weight() if parameter.dtype in (E4M3, E5M2) else parameter.data
            torch.testing.assert_close(got, values[name], rtol=1e-5, atol=close, msg=lambda m, n=name: f"{n}: {m}")


ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}


def rotated(weight: Tensor) -> Stored:
    """Without what says so."""
    stored, values = convrot(GROUP)(weight)
    return {part: value for part, value in stored.items() if part != "comfy_quant"}, values


def in_header(entry: dict[str, object], prefix: str = "") -> dict[str, str]:
    layers = {prefix + layer: entry for layer in quantised_layers(random_weights(CONFIG))}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


HEADERS = {
    "bare": ("", ""),
    "all prefixed": ("model.diffusion_model.", "model.diffusion_model."),
    "tensors prefixed": ("diffusion_model.", ""),
    "layers prefixed": ("", "diffusion_model."),
    "compiled": ("_orig_mod.", "_orig_mod."),
    "compiled, layers bare": ("model._orig_mod.", ""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_names_layers_with_another_prefix_is_heard(tmp_path: Path, case: str):
    """Of what is rotated nothing else tells it."""
    of_tensors, of_layers = HEADERS[case]
    path = tmp_path / "m.safetensors"
    values = written(path, rotated, rename=lambda name: of_tensors + name, metadata=in_header(ROTATED, of_layers))
    check(path, values)


def test_compiled_layers_are_heard_of_their_tensors(tmp_path: Path):
    values = written(tmp_path / "m.safetensors", convrot(GROUP), rename=lambda name: f"_orig_mod.{name}")
    check(tmp_path / "m.safetensors", values)


def test_what_is_said_of_a_layer_that_is_not_there_is_refused(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    written(path, rotated, metadata=in_header(ROTATED, "head."))
    layers = {"text_projection": ROTATED, "lm.head": ROTATED}
    for layer in layers:
        says = {"_quantization_metadata": json.dumps({"layers": {layer: ROTATED}})}
        path.unlink()
        written(path, rotated, metadata=says)
        with pytest.raises(ValueError, match=rf"it is said of {layer}\.weight, which it does not hold, how"):
            Checkpoint([path])


OF_ONE = {
    "in params, as ComfyUI looks for it": {"params": {"convrot": True, "convrot_groupsize": GROUP}},
    "in both": {"convrot": True, "convrot_groupsize": GROUP, "params": {"convrot_groupsize": 64}},
    "of 8 bits": ROTATED | {"bits": 8, "group_size": -1, "symmetric": True, "clip_ratio": 0.9},
}


@pytest.mark.parametrize("case", OF_ONE)
def test_options_in_another_place(tmp_path: Path, case: str):
    entry = {"format": "int8_tensorwise"} | OF_ONE[case]
    values = written(tmp_path / "m.safetensors", said(rotated, **entry))
    check(tmp_path / "m.safetensors", values)


def as_bytes(store: Callable[[Tensor], Stored], *parts: str) -> Callable[[Tensor], Stored]:
    def view(weight: Tensor) -> Stored:
        stored, values = store(weight)
        return stored | {part: stored[part].view(torch.uint8) for part in parts}, values

    return view


def shaped(store: Callable[[Tensor], Stored], part: str, *shape: int) -> Callable[[Tensor], Stored]:
    def view(weight: Tensor) -> Stored:
        stored, values = store(weight)
        return stored | {part: stored[part].reshape(shape)}, values

    return view


NVFP4 = {"format": "nvfp4", "group_size": 16, "orig_dtype": "torch.bfloat16", "orig_shape": [128, 128]}
SPELLINGS: dict[str, Callable[[Tensor], Stored]] = {
    "fp8 as bytes": as_bytes(said(scaled(E4M3), format="float8_e4m3fn_rowwise"), "weight"),
    "e5m2 as bytes": as_bytes(said(scaled(E5M2, rows=False), format="float8_e5m2", orig_dtype="x"), "weight"),
    "nvfp4 with what a converter says": said(FORMATS["nvfp4"], **NVFP4),
    "nvfp4, scales as bytes": as_bytes(FORMATS["nvfp4"], "weight_scale"),
    "nvfp4, the factor as a list": shaped(FORMATS["nvfp4"], "weight_scale_2", 1),
    "nvfp4, scales flat": shaped(FORMATS["nvfp4"], "weight_scale", -1),
    "a scale of more axes": shaped(scaled(E4M3), "weight_scale", -1, 1, 1),
    "int8 by 64, as is said": blocks(torch.int8, 64, 64, "weight_scale", format="int8_blockwise", group_size=64),
    "int8 rows by 64": blocks(torch.int8, 1, 64, "weight_scale", format="int8_blockwise", block_size=64),
    "int8 by 64 x 32": blocks(torch.int8, 64, 32, "weight_scale", format="int8_blockwise", block_size=[64, 32]),
    "int8 by more than there is": blocks(torch.int8, 256, 256, "weight_scale", format="int8_blockwise", block_size=256),
    "fp8 by 128": blocks(E4M3, 128, 128, "weight_scale", format="float8_e4m3fn_blockwise", group_size=128),
    "fp8 by 32, not said": blocks(E4M3, 32, 32, "weight_scale_inv"),
    "fp8 by 64, not said": blocks(E4M3, 64, 64, "weight_scale_inv"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_is_read(tmp_path: Path, case: str):
    """80 rows and inputs are not whole blocks of 32 or 64."""
    values = written(tmp_path / "m.safetensors", SPELLINGS[case])
    check(tmp_path / "m.safetensors", values)


@pytest.mark.parametrize("marker", [torch.zeros(0).to(E4M3), torch.zeros(2).to(E5M2), torch.zeros(()), torch.zeros(1)])
def test_the_old_marker_of_any_dtype_and_size(tmp_path: Path, marker: Tensor):
    old = {"weight": "weight", "weight_scale": "scale_weight"}

    def store(weight: Tensor) -> Stored:
        stored, values = scaled(E5M2, rows=False)(weight)
        return {old[part]: value for part, value in stored.items()} | {"scale_input": torch.ones(())}, values

    for prefix in ("", "model.diffusion_model."):
        path = tmp_path / f"{len(prefix)}.safetensors"
        values = written(path, store, rename=lambda name, p=prefix: p + name, more={f"{prefix}scaled_fp8": marker})
        check(path, values)


def test_each_layer_may_have_its_own_format(tmp_path: Path):
    stores = [
        FORMATS["nvfp4"], said(scaled(E4M3, rows=False), format="float8_e4m3fn"), convrot(GROUP), FORMATS["mxfp8"],
        lambda weight: ({"weight": weight.bfloat16()}, weight.bfloat16().float()), lambda w: ({"weight": w}, w),
    ]  # fmt: skip
    turn = iter(range(10**6))

    def store(weight: Tensor) -> Stored:
        # The last cannot be divided by 32.
        choice = next(turn) % len(stores)
        return stores[0 if weight.shape[1] == 80 and choice == 3 else choice](weight)

    values = written(tmp_path / "m.safetensors", store)
    check(tmp_path / "m.safetensors", values)


WRONG = {
    "other blocks": (
        blocks(torch.int8, 64, 64, "weight_scale", format="int8_blockwise", group_size=128),
        r"expected one number, .* or one for each block of 128 x 128 of the weight's 128 x 128",
    ),
    "nvfp4 by 32": (said(FORMATS["nvfp4"], format="nvfp4", group_size=32), "group_size of .* is 32; it is 16 in nvfp4"),
    "a block of none": (
        blocks(torch.int8, 64, 64, "weight_scale", format="int8_blockwise", block_size=[64, "x"]),
        r"block_size of .* is \[64, 'x'\]; it must be a number, or one for rows and one for inputs",
    ),
    "said to be nvfp4": (said(scaled(E4M3), format="nvfp4"), "is said to be nvfp4, but it has no such codes"),
    "said to be fp8": (said(FORMATS["mxfp8"], format="float8_e4m3fn"), "is said to be float8_e4m3fn, but it has no"),
    "low bits first": (said(FORMATS["nvfp4"], format="nvfp4", low_first=True), "quantised as nvfp4 low_first"),
    "AWQ": (lambda w: ({"qweight": w, "qzeros": w[0]}, w), r"quantised as AWQ or GPTQ \(4 bit\)"),
    "Nunchaku": (lambda w: ({"qweight": w, "wscales": w[0]}, w), r"quantised as Nunchaku"),
    "SDNQ": (lambda w: ({"weight": w.to(torch.int8), "scale": w[0], "zero_point": w[0]}, w), "quantised as SDNQ"),
    "HQQ": (lambda w: ({"W_q": w.to(torch.uint8), "scale": w[0]}, w), "quantised as HQQ"),
    "bitsandbytes": (
        lambda w: ({"weight": w.to(torch.uint8).view(-1, 1), "weight.absmax": w[0], "weight.quant_map": w[0]}, w),
        r"quantised as bitsandbytes \(4 bit\)",
    ),
    "torchao int4": (
        lambda w: ({"_weight_qdata": w.to(torch.int8), "_weight_scale": w[0], "_weight_zero_point": w[0]}, w),
        "quantised as a format with zero points",
    ),
    "quanto int4": (
        lambda w: ({"weight._data._data": w.to(torch.uint8), "weight._scale": w[0], "weight._shift": w[0]}, w),
        "quantised as quanto with zero points",
    ),
    "hybrid": (said(FORMATS["mxfp8"], format="hybrid_mxfp8"), "quantised as hybrid_mxfp8"),
    "rotated, but no codes": (
        said(lambda w: ({"weight": w.bfloat16()}, w), **ROTATED),
        "is said to be int8_tensorwise, but it has no such codes and scales",
    ),
    "int4 by groups": (
        said(shaped(FORMATS["int4 ConvRot"], "weight_scale", 2, -1), format="convrot_w4a4", bits=3),
        "quantised as convrot_w4a4 bits",
    ),
    "int4 of other rows": (
        lambda w: (FORMATS["int4 ConvRot"](w)[0] | {"weight_scale": torch.ones(3)}, w),
        r"the scale of tensor .* has shape \(3,\)",
    ),
    "int4 with scales of 8 bits": (
        lambda w: (FORMATS["int4 ConvRot"](w)[0] | {"weight_scale": torch.ones(96, dtype=torch.uint8)}, w),
        r"the scale of tensor .* has shape \(96,\)",
    ),
    "AWQ of ComfyUI": (said(FORMATS["int4 ConvRot"], format="awq_w4a16"), "quantised as awq_w4a16"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_read_is_named(tmp_path: Path, case: str):
    store, words = WRONG[case]
    # 96 is divided by 32.
    config = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
    path = tmp_path / "m.safetensors"
    written(path, store, config=config)
    with pytest.raises(ValueError, match=words) as caught:
        Checkpoint([path])
    assert str(path) in str(caught.value)


def test_nvfp4_of_a_diffusers_model_is_refused_unless_it_says_that_it_is_comfyuis(tmp_path: Path):
    from checkpoint_formats import diffusers_names

    names = diffusers_names(CONFIG)

    def rename(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        theirs = names.get(name) or f"{names[f'{layer}.weight'].removesuffix('.weight')}.{leaf}"
        assert to_official(theirs) == name
        return theirs

    values = written(tmp_path / "m.safetensors", FORMATS["nvfp4"], rename=rename)
    check(tmp_path / "m.safetensors", values)

    def untold(weight: Tensor) -> Stored:
        stored, values = FORMATS["nvfp4"](weight)
        return {part: value for part, value in stored.items() if part != "comfy_quant"}, values

    check(tmp_path / "n.safetensors", written(tmp_path / "n.safetensors", untold))
    written(tmp_path / "d.safetensors", untold, rename=rename)
    with pytest.raises(ValueError, match="nvfp4 or mxfp8 of another library than ComfyUI"):
        Checkpoint([tmp_path / "d.safetensors"])
