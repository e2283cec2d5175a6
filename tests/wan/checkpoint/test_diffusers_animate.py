"""Animate in diffusers' names: the forward of diffusers' own model, and what is refused of a file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_formats import read_model, write_scaled
from diffusers import WanAnimateTransformer3DModel
from safetensors.torch import load_file, save_file
from single_files import refused
from tiny import TINY_ANIMATE
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.checkpoint.weights import empty_model, read_weights
from wan_pack.wan.model.patch import patchify, unpatchify
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.animate import Face, Pose
from wan_pack.wan.transformer.conditions import Conditions
from wan_pack.wan.transformer.context import Context
from wan_pack.wan.transformer.transformer import WanModel

CPU = torch.device("cpu")
CONFIG = replace(TINY_ANIMATE, dim=256, num_heads=2, num_layers=10)
"""Heads of 128 channels, as a file without config.json must have; two blocks of a face."""
GRID = (3, 3, 5)
FIRST = "face_adapter.1."


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def theirs() -> WanAnimateTransformer3DModel:
    """Every parameter is random, also those that begin as zeros or ones."""
    model = WanAnimateTransformer3DModel(
        num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.head_dim, in_channels=CONFIG.in_dim,
        latent_channels=16, out_channels=CONFIG.out_dim, text_dim=CONFIG.text_dim, freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers, image_dim=CONFIG.clip_dim, added_kv_proj_dim=CONFIG.dim,
        motion_encoder_channel_sizes={str(2**i): CONFIG.motion_dim for i in range(2, 10)},
        motion_style_dim=CONFIG.motion_dim, motion_encoder_dim=CONFIG.motion_dim,
        face_encoder_hidden_dim=CONFIG.face_dim,
    ).requires_grad_(False)  # fmt: skip
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        # The motion encoder's weights are of unit size, as they are trained.
        size = 1 if name.startswith("motion_encoder") and "bias" not in name else 0.1
        parameter.copy_(size * noise(seed, *parameter.shape) + (1.0 if "norm" in name and "weight" in name else 0.0))
    return model.eval()


@pytest.fixture(scope="module")
def folder(theirs: WanAnimateTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves it, in shards."""
    path = tmp_path_factory.mktemp("animate") / "transformer"
    theirs.save_pretrained(path, max_shard_size="5MB")
    assert len(list(path.glob("*-of-*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def read(path: Path) -> WanModel:
    checkpoint = Checkpoint(checkpoint_files(path))
    model = empty_model(checkpoint, torch.float32).to_empty(device=CPU)
    read_weights(model, checkpoint, device=CPU)
    return model


LATENTS, TEXT, PICTURE = noise(101, 36, 3, 6, 10), noise(102, 512, CONFIG.text_dim), noise(103, 257, CONFIG.clip_dim)
POSE = noise(104, 16, 2, 6, 10)
FACE = torch.nn.functional.interpolate(noise(105, 5, 3, 32, 32), size=(512, 512), mode="bilinear").clamp(-1, 1)
STEP = torch.tensor([700.0])


@torch.no_grad()
def our_velocity(model: WanModel, *, faceless: bool = False) -> Tensor:
    """[16, 3, 6, 10]."""
    face = None if faceless else Face(FACE.movedim(1, 0), GRID[0])
    told = Conditions(picture=Context(PICTURE), pose=Pose(POSE), face=face)
    beside = told.on_rank(lambda tokens: tokens, 45, CPU).beside(keep=True)
    rope = rope_table(GRID, CONFIG.head_dim)
    return unpatchify(model(patchify(LATENTS), STEP, Context(TEXT), rope, beside=beside), GRID)


@torch.no_grad()
def their_velocity(model: WanAnimateTransformer3DModel) -> Tensor:
    face = FACE.movedim(1, 0)[None]
    return model(LATENTS[None], STEP, TEXT[None], PICTURE[None], POSE[None], face, return_dict=False)[0][0]


def test_a_folder_gives_the_forward_of_diffusers(
    tmp_path: Path, theirs: WanAnimateTransformer3DModel, folder: Path
) -> None:
    """And, bit for bit, that of the same weights in the official layout."""
    assert Checkpoint(checkpoint_files(folder)).config == CONFIG
    model = read(folder)
    made, expected = our_velocity(model), their_velocity(theirs)
    largest = expected.abs().max().item()
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-5 * largest)
    faceless = our_velocity(model, faceless=True)
    assert (faceless - made).abs().max() > 1e-2 * largest, "the face shows"
    mine = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(mine, tmp_path / "official.safetensors")
    official = read(tmp_path / "official.safetensors")
    assert all(torch.equal(mine[name], parameter) for name, parameter in official.named_parameters())
    assert torch.equal(our_velocity(official, faceless=True), faceless)


def test_every_value_is_one_of_the_files(folder: Path, weights: dict[str, Tensor]) -> None:
    """None is scaled, added or left out; the keys' rows of a face's block are in front of the values'."""
    model = read(folder)
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in weights.values())
    for kind in ("weight", "bias"):
        keys, values = (weights[f"{FIRST}to_{half}.{kind}"] for half in "kv")
        found = model.get_parameter(f"face_adapter.fuser_blocks.1.linear1_kv.{kind}")
        assert torch.equal(found, torch.cat((keys, values)))
    convs = model.get_submodule("motion_encoder.enc.net_app.convs")
    for place, name in (("0.0.weight", "conv_in.weight"), ("8.weight", "conv_out.weight"),
                        ("7.conv2.1.weight", "res_blocks.6.conv2.weight")):  # fmt: skip
        assert torch.equal(convs.get_parameter(place), weights[f"motion_encoder.{name}"])
    bias = weights["motion_encoder.res_blocks.3.conv2.act_fn.bias"]
    assert torch.equal(convs.get_parameter("4.conv2.2.bias"), bias[None, :, None, None])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_read_too(tmp_path: Path, folder: Path, weights: dict[str, Tensor], prefix: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({prefix + name: tensor.bfloat16() for name, tensor in weights.items()}, path)
    matrices = sum(tensor.dim() > 1 for tensor in weights.values())
    # Two are the halves of one, in each of two blocks; the biases have sizes of 1 here.
    biases = sum(name.endswith("act_fn.bias") for name in weights)
    assert Checkpoint([path]).describe() == f"{path}: {matrices - 2 + biases} weights in BF16"
    rounded = dict(read_model(path, torch.float32).named_parameters())
    for name, parameter in read(folder).named_parameters():
        assert torch.equal(rounded[name], parameter.bfloat16().float()), name


@pytest.mark.parametrize("scaled", ["kv", "k", "v"])
def test_halves_in_fp8_have_their_own_scales(
    tmp_path: Path, weights: dict[str, Tensor], scaled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay fp8 where both are, and rows of either can be read."""
    wanted = {f"{FIRST}to_{half}.weight" for half in scaled}
    monkeypatch.setattr("checkpoint_formats.is_quantised", lambda name, tensor: name in wanted)
    weights = weights | {f"{FIRST}to_v.weight": 7 * weights[f"{FIRST}to_v.weight"]}
    path = tmp_path / "m.safetensors"
    values = write_scaled(path, weights, torch.float8_e4m3fn, scale="scale_weight", per_row=False)
    name = "face_adapter.fuser_blocks.1.linear1_kv.weight"
    expected = torch.cat([values[f"{FIRST}to_{half}.weight"] for half in "kv"])
    checkpoint, layer = Checkpoint([path]), read_model(path, torch.float32).get_submodule(name[: -len(".weight")])
    assert (name in checkpoint.codes) == (scaled == "kv") == (layer.weight.dtype == torch.float8_e4m3fn)
    rows = layer.weight.float() * layer.weight_scale if scaled == "kv" else layer.weight
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=0)
    staging = torch.empty(1 << 20, dtype=torch.uint8)
    for first, count in ((0, 512), (100, 100), (200, 112), (256, 1), (300, 200)):
        found = torch.empty(count, CONFIG.dim)
        checkpoint.read_into(name, found, start=first * CONFIG.dim, staging=staging)
        torch.testing.assert_close(found, expected[first : first + count], rtol=1e-6, atol=0)


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def test_what_is_not_whole_is_refused_by_name(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path, half = tmp_path / "m.safetensors", f"{FIRST}to_v.weight"
    refused(path, without(weights, half), r"face_adapter\.1\.to_k\.weight has shape \(256, 256\), and there is no ot")
    refused(path, weights | {half: torch.zeros(8, 256)}, r"to_k\.weight has .* other half has \(8, 256\); expected two")
    both = without(weights, half, f"{FIRST}to_k.weight")
    refused(path, both, r"1 tensors are missing \(face_adapter\.fuser_blocks\.1\.linear1_kv\.weight\)")
    name = "motion_encoder.res_blocks.6.conv_skip.weight"
    refused(path, without(weights, name), r"are missing \(motion_encoder\.enc\.net_app\.convs\.7\.skip\.1\.weight\)")
    bias = "motion_encoder.conv_in.act_fn.bias"
    refused(path, weights | {bias: torch.zeros(31)}, r"convs\.0\.1\.bias has shape \(1, 31, 1, 1\); expected \(1, 32, ")
    more = {"motion_encoder.res_blocks.7.conv1.weight": torch.zeros(2, 2), "face_adapter.1.to_x.weight": torch.zeros(2)}
    refused(path, weights | more, r"2 tensors that are unknown \(face_adapter\.1\.to_x\.weight, motion_enc.*7\.conv1")


def test_what_was_converted_in_part_is_refused_by_name(
    tmp_path: Path, folder: Path, weights: dict[str, Tensor]
) -> None:
    """Names, but not the motion encoder's, or the face's blocks alone, in either direction."""
    path, official = tmp_path / "m.safetensors", dict(read(folder).named_parameters())
    of_face, of_motion = (re.compile(pattern) for pattern in ("face_adapter", "motion_encoder"))
    for part, named in ((of_face, "face_adapter.fuser_blocks.0.k_norm.weight"), (of_motion, "motion_encoder.dec.dir")):
        mixed = {n: t for n, t in weights.items() if not part.match(n)} | {
            n: t.detach() for n, t in official.items() if part.match(n)
        }
        refused(path, mixed, rf"in diffusers' names with \d+ tensors in the official ones \({re.escape(named)}")
    kernel = {"motion_encoder.enc.net_app.convs.1.skip.0.kernel": torch.ones(4, 4)}
    refused(path, weights | kernel, r"with 1 tensors in the official ones \(motion_encoder\.enc.*\.kernel\)")
    mixed = {n: t.detach() for n, t in official.items() if not of_face.match(n)}
    mixed |= {n: t for n, t in weights.items() if of_face.match(n)}
    refused(path, mixed, r"in the official names with 20 tensors in diffusers' ones \(face_adapter\.0\.norm_k\.weight")
