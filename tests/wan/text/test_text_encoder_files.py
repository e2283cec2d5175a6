"""Every file that holds a umT5 encoder loads to the same tensors; every other one is named before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor
from umt5 import LAYERS, MODEL, SENTENCES, gguf_tokenizer, hf_weights, train_spiece, wide_hf_weights, write_gguf
from wan_pack.wan.files.gguf_files import GgufFile
from wan_pack.wan.files.model_folder import folder_files
from wan_pack.wan.text.gguf_tokenizer import sentencepiece_model
from wan_pack.wan.text.t5_keys import EXPECTED, check_text_encoder_files, module_names
from wan_pack.wan.text.text_encoder import TextEncoder, load_text_encoder
from wan_pack.wan.text.tokenizer import Tokenizer
from wan_pack.wan.text.tokenizer_files import choose_tokenizer_file


@pytest.fixture
def spiece() -> bytes:
    return train_spiece()


@pytest.fixture
def tokenizer_file(spiece: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "spiece.model"
    path.write_bytes(spiece)
    return path


def _weights(encoder: TextEncoder) -> dict[str, Tensor]:
    return dict(encoder.model.state_dict())


def test_every_file_loads_to_the_same_tensors(spiece: bytes, tokenizer_file: Path, tmp_path: Path) -> None:
    official, hf = load_file(MODEL), hf_weights()
    piece = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    alias = dict(hf)
    alias["encoder.embed_tokens.weight"] = alias.pop("shared.weight")
    whole = hf | {"decoder.final_layer_norm.weight": torch.ones(48), "lm_head.weight": torch.ones(300, 48)}
    half = len(hf) // 2
    files: dict[str, dict[str, Tensor]] = {
        "comfy.safetensors": hf | piece,
        "alias.safetensors": alias | piece,
        "whole.safetensors": whole | piece,
        "stack.safetensors": {name.removeprefix("encoder."): tensor for name, tensor in (alias | piece).items()},
        "prefixed.safetensors": {
            f"text_encoders.umt5xxl.transformer.{name}": tensor for name, tensor in (hf | piece).items()
        },
        "shard1.safetensors": dict(list(hf.items())[:half]),
        "shard2.safetensors": dict(list(hf.items())[half:]),
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    torch.save(official, tmp_path / "official.pth")
    weight_map = {name: file for file, tensors in files.items() if file.startswith("shard") for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = _weights(load_text_encoder([MODEL], [tokenizer_file], dtype=torch.float32))
    shards = [path.name for path in folder_files(tmp_path, EXPECTED)]
    assert shards == ["shard1.safetensors", "shard2.safetensors"]
    for names in (*([name] for name in files if name not in shards), shards, ["official.pth"]):
        paths = [tmp_path / name for name in names]
        tokenizer = [] if names[0] not in (*shards, "official.pth") else [tokenizer_file]
        info = check_text_encoder_files(paths, tokenizer)
        assert info.layers == 2
        encoder = load_text_encoder(paths, tokenizer, dtype=torch.float32)
        assert encoder.tokenizer("a cat") == Tokenizer(spiece)("a cat")
        for name, tensor in _weights(encoder).items():
            assert torch.equal(tensor, expected[name]), (names, name)


def _quantise(tensor: Tensor, dtype: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor]:
    """The stored values, and the scale that they are multiplied by."""
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()) / most
    stored = tensor / scale
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


FP8, FP8_WIDE, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8


@pytest.mark.parametrize(
    ("dtype", "per_row", "scale_name", "official", "says"),
    [
        (FP8, False, "scale_weight", False, None),
        (FP8, False, "weight_scale", False, "tensor"),
        (FP8, False, "weight_scale", False, "metadata"),
        (FP8_WIDE, False, "scale_weight", True, None),
        (INT8, True, "weight_scale", False, "tensor"),
        (FP8, True, "weight_scale", True, "pth"),
        (INT8, True, "weight_scale", True, "pth"),
        (FP8, False, None, True, None),
    ],
    ids=["comfyui", "comfy_quant", "metadata", "e5m2", "int8", "lightx2v", "lightx2v_int8", "unscaled"],
)
def test_quantised_files(
    dtype: torch.dtype,
    per_row: bool,
    scale_name: str | None,
    official: bool,
    says: str | None,
    tokenizer_file: Path,
    tmp_path: Path,
) -> None:
    """Who writes what: ComfyUI (old, new, newest), Kijai (scaled, plain), LightX2V."""
    names = module_names(LAYERS)
    whole = load_file(MODEL) if official else hf_weights()
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2).to(FP8)} if scale_name == "scale_weight" else {}
    expected: dict[str, Tensor] = {}
    formats: dict[str, dict[str, str]] = {}
    for name, tensor in whole.items():
        module = name.removesuffix(".weight")
        hf = f"{names[module] if official else module}.weight"
        if tensor.dim() == 1 or "pos_embedding" in name or "relative" in name:
            tensors[name] = expected[hf] = tensor
        elif scale_name is None:
            tensors[name] = tensor.to(dtype)
            expected[hf] = tensors[name].float()
        else:
            tensors[name], scale = _quantise(tensor, dtype, per_row)
            tensors[f"{module}.{scale_name}"] = scale
            expected[hf] = tensors[name].float() * scale
            formats[module] = {"format": "int8_tensorwise" if dtype == INT8 else "float8_e4m3fn"}
    if says == "tensor":
        tensors |= {f"{module}.comfy_quant": _bytes(json.dumps(entry)) for module, entry in formats.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}
    path = tmp_path / ("x.pth" if says == "pth" else "x.safetensors")
    if says == "pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata=metadata if says == "metadata" else None)
    check_text_encoder_files([path], [tokenizer_file])
    weights = _weights(load_text_encoder([path], [tokenizer_file], dtype=torch.float32))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


LAYER = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("extra", "metadata", "words"),
    [
        (
            {f"{LAYER}.weight": torch.zeros(48, 24, dtype=torch.uint8)},
            {},
            "quantised as a packed format of 8 bits",
        ),
        ({f"{LAYER}.weight_scale": torch.ones(48, 5)}, {}, f"{LAYER}.weight has shape (48, 5)"),
        ({f"{LAYER}.weight_scale": torch.ones(24, 1)}, {}, f"{LAYER}.weight has shape (24, 1)"),
        ({f"{LAYER}.comfy_quant": _bytes('{"format": "nvfp4"}')}, {}, f"{LAYER}.weight is said to be nvfp4, but"),
        ({}, {"layers": {LAYER: {"format": "mxfp8"}}}, f"{LAYER}.weight is said to be mxfp8, but"),
        ({}, {"layers": {LAYER: "svdquant_w4a4"}}, f"quantised as svdquant_w4a4 ({LAYER})"),
        (
            {f"{LAYER}.comfy_quant": _bytes('{"format": "int8_tensorwise", "convrot": true}')},
            {},
            "is said to be int8_tensorwise, but it has no such codes and scales",
        ),
        ({f"{LAYER}.comfy_quant": _bytes("{")}, {}, "describes its quantisation in an unknown way"),
        ({f"{LAYER}.comfy_quant": torch.zeros(5000, dtype=torch.uint8)}, {}, "has 5000 bytes; at most 1024"),
        ({}, {"layers": 3}, "_quantization_metadata has no layers"),
        ({"spiece_model": torch.zeros(0, dtype=torch.uint8)}, {}, "spiece_model"),
        ({f"{LAYER}.weight": torch.zeros(48, 40)}, {}, f"tensor {LAYER}.weight has shape [48, 40]; the sizes"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    extra: dict[str, Tensor], metadata: dict[str, object], words: str, spiece: bytes, tmp_path: Path
) -> None:
    piece = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    path = tmp_path / "odd.safetensors"
    save_file(
        hf_weights() | piece | extra,
        path,
        metadata={"_quantization_metadata": json.dumps(metadata)} if metadata else None,
    )
    for attempt in (lambda: check_text_encoder_files([path], []), lambda: load_text_encoder([path])):
        with pytest.raises(ValueError, match=r"odd\.safetensors") as caught:
            attempt()
        assert words in str(caught.value)


def test_a_tensor_in_two_shards_is_named(tokenizer_file: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(hf_weights(), tmp_path / name)
    with pytest.raises(ValueError, match=r"b\.safetensors: tensor .* is also in .*a\.safetensors"):
        check_text_encoder_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], [tokenizer_file])


@pytest.mark.parametrize(("kind", "renamed"), [("F16", True), ("Q8_0", True), ("Q4_0", True), ("Q8_0", False)])
def test_gguf(kind: str, renamed: bool, tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "umt5-xxl-encoder.gguf"
    meaning = write_gguf(path, wide_hf_weights(), kind, {}, renamed=renamed)
    for attempt in (check_text_encoder_files, load_text_encoder):
        with pytest.raises(ValueError, match=r"umt5-xxl-encoder\.gguf carries no tokenizer.*google/umt5-xxl"):
            attempt([path], [])
    info = check_text_encoder_files([path], [tokenizer_file])
    assert (info.dim, info.vocab, info.layers, info.heads, info.ffn_dim) == (64, 300, 2, 4, 128)
    weights = _weights(load_text_encoder([path], [tokenizer_file], dtype=torch.float32))
    for name, tensor in meaning.items():
        assert torch.equal(weights[name], tensor), name


def test_gguf_carries_its_tokenizer(spiece: bytes, tmp_path: Path) -> None:
    path, foreign = tmp_path / "umt5.gguf", tmp_path / "tokenizer.json"
    foreign.write_text("{}")
    metadata = gguf_tokenizer(spiece)
    write_gguf(path, wide_hf_weights(), "F16", metadata)
    check_text_encoder_files([path], [foreign])
    ours, theirs = load_text_encoder([path], [foreign]).tokenizer, Tokenizer(spiece)
    assert ours.vocab == 300
    # One is "a cat" only once its raised letters are replaced.
    for text in (*SENTENCES, "\u00aa c\u00aat", "  two\u3000cats ", "\u8272\u8c03", "", "cat " * 700):
        assert ours(text) == theirs(text)
    assert ours("\u00aa c\u00aat") == ours("a cat")
    # Of a model in parts the first has what is said of all.
    weights, parts = wide_hf_weights(), [tmp_path / f"t5-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, part in enumerate(parts):
        write_gguf(part, {n: weights[n] for n in list(weights)[i::2]}, "F16", {} if i else metadata)
    files = folder_files(parts[1], EXPECTED)
    check_text_encoder_files(files, [])
    assert load_text_encoder(files).tokenizer("a cat") == ours("a cat")
    for name, words in (("tokens", "299 tokens"), ("scores", "299 scores"), ("token_type", "299 types")):
        key = f"tokenizer.ggml.{name}"
        write_gguf(path, weights, "F16", metadata | {key: metadata[key][:-1]})
        with pytest.raises(ValueError, match=rf"umt5\.gguf carries a damaged tokenizer: .*{words}"):
            sentencepiece_model(GgufFile(path))


def test_wrong_gguf_files_are_named(tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    t5 = {name: t for name, t in wide_hf_weights().items() if "1.layer.0.SelfAttention.relative" not in name}
    write_gguf(path, t5, "F16", {})
    words = ["a T5 text encoder, not a umT5, that lacks 1 tensors (enc.blk.1.attn_rel_b)"]
    path2 = tmp_path / "cut.gguf"
    write_gguf(path2, wide_hf_weights(), "F16", {})
    path2.write_bytes(path2.read_bytes()[:-1000])
    path3 = tmp_path / "text.gguf"
    path3.write_bytes(b"<html></html>")
    words += ["is a damaged or truncated GGUF file", "is a web page"]
    for file, expected in zip((path, path2, path3), words, strict=True):
        for attempt in (check_text_encoder_files, load_text_encoder):
            with pytest.raises(ValueError, match="expected a umT5") as caught:
                attempt([file], [tokenizer_file])
            assert file.name in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("dit_t2v/model/diffusion_pytorch_model.safetensors", "a Wan DiT checkpoint"),
        ("vae_wan21/vae/model.safetensors", "a Wan2.1 VAE"),
        ("README.md", "of an unknown format"),
        ("none.safetensors", "cannot be read"),
        ("none.pth", "cannot be read"),
    ],
)
def test_wrong_files_are_named(path: str, words: str, tokenizer_file: Path) -> None:
    file = GOLDEN / path
    for attempt in (check_text_encoder_files, load_text_encoder):
        with pytest.raises(ValueError, match="expected a umT5 text encoder") as caught:
            attempt([file], [tokenizer_file])
        assert str(file) in str(caught.value) and words in str(caught.value)


def test_incomplete_files_are_named(tokenizer_file: Path, tmp_path: Path) -> None:
    hf = hf_weights()
    t5 = {name: tensor for name, tensor in hf.items() if "1.layer.0.SelfAttention.relative" not in name}
    save_file({name: t for name, t in hf.items() if "final" not in name}, tmp_path / "lacking.safetensors")
    save_file(t5, tmp_path / "t5.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(MODEL.read_bytes()[:-100])
    torch.save(load_file(MODEL), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-100])
    for name, words in (
        ("lacking.safetensors", "a umT5 text encoder that lacks 1 tensors (encoder.final_layer_norm)"),
        ("t5.safetensors", "a T5 text encoder, not a umT5"),
        ("cut.safetensors", "is truncated"),
        ("cut.pth", "truncated or damaged"),
    ):
        for attempt in (check_text_encoder_files, load_text_encoder):
            with pytest.raises(ValueError, match="expected a umT5") as caught:
                attempt([tmp_path / name], [tokenizer_file])
            assert name in str(caught.value) and words in str(caught.value)


def test_what_was_looked_for_a_tokenizer_in_is_named() -> None:
    with pytest.raises(ValueError, match=r"^umt5 carries no tokenizer and no tokenizer was found; expected"):
        choose_tokenizer_file([], "umt5")
    with pytest.raises(
        ValueError, match=r"^umt5 carries no tokenizer and the tokenizer files given are a\.txt, b; exp"
    ):
        choose_tokenizer_file(["a.txt", "b"], "umt5")
