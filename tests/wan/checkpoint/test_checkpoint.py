"""Every layout loads to the same tensors; every wrong file is named before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_formats import (
    comfy_quant,
    quantised_layers,
    write_diffusers,
    write_gguf,
    write_plain_fp8,
    write_scaled,
)
from safetensors.torch import load_file, save_file
from single_files import SINGLE, loaded, refused, single_file
from tiny import TINY, random_weights, write_official
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.checkpoint.weights import read_weights
from wan_pack.wan.transformer.transformer import meta_model, parameter_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_loads_to_the_same_tensors(tmp_path: Path, dtype: torch.dtype):
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(SINGLE).items()}
    paths = [
        write_official(tmp_path / "one", weights, SINGLE),
        write_official(tmp_path / "sharded", weights, SINGLE, shards=3),
        single_file(tmp_path / "plain.safetensors", weights),
        single_file(tmp_path / "prefixed.safetensors", weights, "model.diffusion_model."),
        single_file(tmp_path / "short.safetensors", weights, "model."),
    ]
    for path in paths:
        for name, tensor in loaded(path).items():
            assert torch.equal(tensor, weights[name].float()), (path, name)


def all_in_one(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a VAE and a text encoder beside it, whose format is another."""
    encoder = "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    others = {
        "vae.decoder.middle.0.residual.0.gamma": torch.ones(3),
        f"{encoder}.weight": torch.zeros(4, 2, dtype=torch.uint8),
        f"{encoder}.comfy_quant": comfy_quant(format="nvfp4"),
    }
    save_file({f"model.diffusion_model.{name}": t for name, t in weights.items()} | others, path)
    return weights


SAYS = {
    "_quantization_metadata": json.dumps(
        {"format_version": "1.0", "layers": {"blocks.0.self_attn.q": {"format": "float8_e4m3fn"}, "x": "float8_e5m2"}}
    )
}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {
    "diffusers": lambda path, w: write_diffusers(path, w, SINGLE, shards=1),
    "diffusers in shards": lambda path, w: write_diffusers(path, w, SINGLE, shards=3),
    "all in one": all_in_one,
    "fp8": lambda path, w: write_plain_fp8(path, w, E4M3),
    "fp8 with a prefix": lambda path, w: write_plain_fp8(path, w, E5M2, prefix="model.diffusion_model."),
    "ComfyUI fp8_scaled": lambda path, w: write_scaled(
        path, w, E4M3, scale="scale_weight", per_row=False, prefix="model.diffusion_model.",
        extra={"scaled_fp8": torch.zeros(0).to(E4M3), "blocks.0.self_attn.q.scale_input": torch.ones(())},
    ),
    "Kijai e5m2": lambda path, w: write_scaled(
        path, w, E5M2, scale="scale_weight", per_row=False, extra={"scaled_fp8": torch.zeros(2).to(E5M2)}
    ),
    "LightX2V fp8": lambda path, w: write_scaled(path, w, E4M3, scale="weight_scale", per_row=True),
    "LightX2V int8": lambda path, w: write_scaled(path, w, torch.int8, scale="weight_scale", per_row=True),
    "quantisation in the header": lambda path, w: write_scaled(
        path, w, E4M3, scale="weight_scale", per_row=False, metadata=SAYS,
        extra={"blocks.0.self_attn.q.input_scale": torch.ones(())},
    ),
    "comfy_quant": lambda path, w: write_scaled(
        path, w, E4M3, scale="weight_scale", per_row=False,
        extra={
            f"{layer}.comfy_quant": comfy_quant(format="float8_e4m3fn", full_precision_matrix_mult=True)
            for layer in quantised_layers(w)
        },
    ),
    "comfy_quant int8": lambda path, w: write_scaled(
        path, w, torch.int8, scale="weight_scale", per_row=False,
        extra={f"{layer}.comfy_quant": comfy_quant(format="int8_tensorwise") for layer in quantised_layers(w)},
    ),
    "GGUF F16": lambda path, w: write_gguf(path, w, "F16"),
    "GGUF Q8_0": lambda path, w: write_gguf(path, w, "Q8_0"),
    "GGUF Q4_0 with a prefix": lambda path, w: write_gguf(path, w, "Q4_0", prefix="model.diffusion_model."),
}  # fmt: skip
"""Name -> what writes it at a path; returns the values that the file stands for."""

ROUNDING = {"fp8 with a prefix": 0.13, "Kijai e5m2": 0.13, "GGUF Q4_0 with a prefix": 0.13, "diffusers": 0.0,
            "diffusers in shards": 0.0, "all in one": 0.0, "GGUF F16": 5e-4}  # fmt: skip
"""Of a format, relative to the largest value of a block; 0.07 for the others."""


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_loads_to_the_same_tensors(tmp_path: Path, kind: str):
    """Exactly to what the file stands for, and to within the format's rounding to the weights it was made from."""
    weights = random_weights(SINGLE)
    path = tmp_path / ("m.gguf" if kind.startswith("GGUF") else "m.safetensors")
    values = FORMATS[kind](path, weights)
    tensors = loaded(path)
    assert tensors.keys() == weights.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, values[name]), name
        error = (tensor - weights[name]).abs().max() / weights[name].abs().max()
        assert error <= ROUNDING.get(kind, 0.07), name
    rounded = loaded(path, torch.bfloat16)
    assert all(torch.equal(t, values[n].to(parameter_dtype(n, torch.bfloat16))) for n, t in rounded.items())


def test_the_log_says_what_becomes_of_quantised_weights(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    for kind, words in (
        ("LightX2V fp8", "20 weights in F8_E4M3; 20 of them stay fp8 in memory, 20 with scales"),
        ("fp8", "20 of them stay fp8 in memory, 0 with scales"),
        ("comfy_quant int8", "20 weights in I8; quantised ones are unpacked while they are read"),
    ):
        FORMATS[kind](path, random_weights(SINGLE))
        text = Checkpoint([path]).describe()
        assert all(part in text for part in words.split("; ")), text
    assert Checkpoint([single_file(path, random_weights(SINGLE))]).describe() == f"{path}: 30 weights in F32"


@pytest.mark.parametrize(("channels", "name"), [((16, 16), "T2V"), ((36, 16), "I2V"), ((48, 48), "TI2V-5B")])
def test_every_variant_is_opened(tmp_path: Path, channels: tuple[int, int], name: str):
    config = replace(SINGLE, in_dim=channels[0], out_dim=channels[1])
    official = Checkpoint([single_file(tmp_path / "m.safetensors", random_weights(config))])
    write_diffusers(tmp_path / "transformer", random_weights(config), config, shards=2)
    diffusers = Checkpoint(checkpoint_files(tmp_path / "transformer"))
    assert official.config == diffusers.config == config
    assert config.variant.name == name


def test_weights_are_cast_by_the_precision_policy(tmp_path: Path):
    weights = random_weights(SINGLE)
    for name, tensor in loaded(single_file(tmp_path / "w.safetensors", weights), torch.bfloat16).items():
        assert torch.equal(tensor, weights[name].to(parameter_dtype(name, torch.bfloat16))), name


def test_heads_come_from_config_json(tmp_path: Path):
    assert Checkpoint(checkpoint_files(write_official(tmp_path / "t", random_weights()))).config == TINY
    (tmp_path / "t" / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": "many"}))
    with pytest.raises(ValueError, match=r"config.json: num_heads is 'many'"):
        Checkpoint(checkpoint_files(tmp_path / "t"))
    write_diffusers(tmp_path / "diffusers", random_weights(), TINY, shards=2)
    assert Checkpoint(checkpoint_files(tmp_path / "diffusers")).config == TINY


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"vace_blocks.0.norm3.weight": (4,)}, r"not a whole VACE transformer: \d+ tensors are missing"),
        ({"vace_blocks.x.norm3.weight": (4,)}, r"unknown \(vace_blocks\.x\.norm3"),
        ({"control_adapter.conv.bias": (4,)}, r"and control_adapter, not one of .*36 .* and control_adapter \(Fun-Cam"),
        ({"ref_conv.weight": (4,)}, r"16 out and ref_conv, not one of .*52 .* and ref_conv \(Fun-Control\)"),
        ({"audio_injector.x": (4,)}, "S2V"),
        ({"blocks.0.audio_cross_attn.q.weight": (4,)}, "audio branch"),
        (
            {"face_adapter.x": (4,)},
            r"and face_adapter, not one of .*36 .* and face_adapter, face_encoder, .* \(Animate",
        ),
        ({"motion_encoder.motion_synthesis_weight": (512, 20)}, "1 tensors in diffusers' ones .*converted in part"),
        ({"img_emb.proj.0.bias": (4,)}, r"and img_emb, not one of .*36 .* and 16 out and img_emb \(Wan2\.1 I2V\)"),
        ({"blocks.0.cross_attn.k_img.weight": (4,)}, r"unknown \(blocks\.0\.cross_attn\.k_img"),
        ({"patch_embedding.weight": (128, 32, 1, 2, 2)}, r"32 latent channels in and 16 out, not one of .*32 lat"),
        ({"patch_embedding.weight": (128, 100, 1, 2, 2)}, r"100 latent channels in and 16 out, not one of .*36 lat"),
        ({"patch_embedding.weight": (128, 16, 1, 2, 2), "head.modulation": (1, 2, 2**21)}, "sizes must be 1 to"),
        (
            {"blocks.0.ffn.0.surprise": (4,)},
            r"1 tensors that are unknown \(blocks\.0\.ffn\.0\.surprise\)",
        ),
        ({"fps_embedding.weight": (2, 128), "fps_projection.0.weight": (128, 128)}, r"SkyReels DF"),
        ({"patch_embedding_pose.weight": (128, 16, 1, 2, 2)}, "Wan SCAIL transformer"),
        ({"patch_embedding_mask.weight": (128, 28, 1, 2, 2)}, "Wan SCAIL-2 transformer"),
        ({"blocks.0.cross_attn.ip_adapter.to_k_ip.weight": (128, 128)}, "Lynx"),
        ({"blocks.0.self_attn.q_loras.down.weight": (4, 128)}, "Stand-In"),
        ({"controlnet.blocks.0.weight": (128, 128)}, "Uni3C"),
        ({"blocks.1.ffn.0.bias": (81,)}, r"blocks\.1\.ffn\.0\.bias has shape \(81,\); expected \(80,\)"),
    ],
)
def test_other_transformers_are_refused_by_name(tmp_path: Path, extra: dict[str, tuple[int, ...]], words: str):
    weights = random_weights(SINGLE) | {name: torch.zeros(shape) for name, shape in extra.items()}
    refused(tmp_path / "model.safetensors", weights, words)


def test_other_files_are_refused_by_name(tmp_path: Path, golden_folder: Path):
    for name, words in (
        ("blocks.0.self_attn.q_loras.down.weight", "a Stand-In LoRA"),
        ("controlnet_patch_embedding.weight", "a Uni3C controlnet"),
        ("0.to_k_ip.weight", "a Lynx adapter"),
    ):
        refused(tmp_path / "x.safetensors", {name: torch.zeros(4, 4)}, f"it is {words}; expected a Wan transformer")
    tiny_vae = {"decoder.1.weight": torch.zeros(4), "decoder.3.conv.0.weight": torch.zeros(4)}
    refused(tmp_path / "x.safetensors", tiny_vae, r"a tiny VAE for previews \(TAEHV\)")
    refused(tmp_path / "x.safetensors", {"blocks.0.ffn.0.lora_down.weight": torch.zeros(4, 4)}, "a LoRA")
    for case, words in (("vae_wan21/vae", "VAE"), ("t5_encoder/text_encoder", "umT5 text encoder")):
        refused(tmp_path / "y.safetensors", load_file(golden_folder / case / "model.safetensors"), words)
    weights = random_weights(SINGLE)
    both = weights | {"proj_out.bias": weights["head.head.bias"].clone()}
    refused(tmp_path / "b.safetensors", both, r"holds head\.head\.bias, proj_out\.bias, which are the same")
    missing = {name: tensor for name, tensor in weights.items() if "blocks.1.ffn" not in name}
    refused(tmp_path / "z.safetensors", missing, "4 tensors are missing.*blocks.1.ffn.0.bias")


def test_a_truncated_file_is_named(tmp_path: Path):
    path = single_file(tmp_path / "cut.safetensors", random_weights(SINGLE))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors is truncated"):
        Checkpoint([path])


def test_a_file_that_shrinks_later_is_an_error_not_garbage(tmp_path: Path):
    path = single_file(tmp_path / "shrinks.safetensors", random_weights(SINGLE))
    checkpoint = Checkpoint([path])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    model = meta_model(SINGLE, torch.float32).to_empty(device="cpu")
    with pytest.raises(OSError, match=r"shrinks.safetensors ended at byte"):
        read_weights(model, checkpoint, device=torch.device("cpu"))


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
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            checkpoint_files(folder)
    with pytest.raises(ValueError, match="holds none of diffusion_pytorch_model"):
        checkpoint_files(tmp_path)
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(ValueError, match="choose one of its folders transformer_2"):
        checkpoint_files(tmp_path)
    with pytest.raises(ValueError, match=r"expected a \.safetensors"):
        checkpoint_files(tmp_path / "model.ckpt")
