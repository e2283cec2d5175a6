"""Wan2.2's transformer in small, with random weights, and a LoRA for it. Official tensor names.

So that a clip shows more than noise, the first block is set up to keep what neighbouring tokens have in common:
coloured clouds.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..wan.model.config import HEAD_DIM, PICTURE_ROWS, WanConfig
from ..wan.transformer.motion_encoder import BLUR, HALVINGS, MotionEncoder

DIM = 256
"""Two heads of 128: without a config.json a head has 128 channels."""
FFN_DIM = 512
LAYERS = 2
TEXT_DIM = 64
FREQ_DIM = 256
CLIP_DIM = 1280
CONTROL_DIM = 96
MOTION_DIM, FACE_DIM = 512, 1024
ANIMATE_LAYERS = 5
"""As many as one block of the face adapter is for."""
CAMERA_CHANNELS = 24
"""Of a pixel's rays in four frames."""
SHARPNESS = 1.7
"""Of the blur: higher is narrower."""
GROWTH = 2.0
LORA_RANK = 4
LORA_LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2")


def expert(
    seed: int,
    in_dim: int = 16,
    out_dim: int = 16,
    text_dim: int = TEXT_DIM,
    parts: Collection[str] = (),
) -> dict[str, Tensor]:
    """One transformer.

    Args:
        in_dim: channels of the latents, and of the conditioning behind them: 16 for T2V, 36 for I2V, 48 for TI2V.
        out_dim: channels of the latents.
        text_dim: channels of the text; ComfyUI's own loader takes umT5-xxl's 4096 only.
        parts: what only some variants have: img_emb, emb_pos, ref_conv, control_adapter, vace_blocks, face_adapter (all
            of Animate's).
    """
    make = _Weights(seed)
    for name, rows, columns in (
        ("text_embedding.0", DIM, text_dim),
        ("text_embedding.2", DIM, DIM),
        ("time_embedding.0", DIM, FREQ_DIM),
        ("time_embedding.2", DIM, DIM),
        ("time_projection.1", 6 * DIM, DIM),
    ):
        make.linear(name, rows, columns)
    make.linear("patch_embedding", DIM, in_dim, 1, 2, 2)
    layers = ANIMATE_LAYERS if "face_adapter" in parts else LAYERS
    for layer in range(layers):
        make.block(f"blocks.{layer}")
    make.normal("head.modulation", (1, 2, DIM), DIM**-0.5)
    make.linear("head.head", 4 * out_dim, DIM)
    _keep_what_neighbours_share(make.tensors, out_dim)
    if "img_emb" in parts:
        _add_image_branch(make, layers, places="emb_pos" in parts)
    if "ref_conv" in parts:
        make.linear("ref_conv", DIM, out_dim, 2, 2)
    if "control_adapter" in parts:
        make.linear("control_adapter.conv", DIM, CAMERA_CHANNELS * (64 if out_dim == 16 else 256), 2, 2)
        for part in ("conv1", "conv2"):
            make.linear(f"control_adapter.residual_blocks.0.{part}", DIM, DIM, 3, 3)
    if "vace_blocks" in parts:
        _add_vace_blocks(make)
    if "face_adapter" in parts:
        _add_animate(make, out_dim)
    return make.tensors


def _add_image_branch(make: _Weights, layers: int, *, places: bool) -> None:
    """places: of two pictures (FLF2V)."""
    for part, dim in (("0", CLIP_DIM), ("4", DIM)):
        make.ones(f"img_emb.proj.{part}.weight", dim)
        make.normal(f"img_emb.proj.{part}.bias", (dim,), 0.02)
    make.linear("img_emb.proj.1", CLIP_DIM, CLIP_DIM)
    make.linear("img_emb.proj.3", DIM, CLIP_DIM)
    if places:
        make.normal("img_emb.emb_pos", (1, 2 * PICTURE_ROWS, CLIP_DIM), 0.5)
    for layer in range(layers):
        for part in ("k_img", "v_img"):
            make.linear(f"blocks.{layer}.cross_attn.{part}", DIM, DIM)
        make.ones(f"blocks.{layer}.cross_attn.norm_k_img.weight", DIM)


def _add_vace_blocks(make: _Weights) -> None:
    """One behind each block."""
    make.linear("vace_patch_embedding", DIM, CONTROL_DIM, 1, 2, 2)
    for layer in range(LAYERS):
        make.block(f"vace_blocks.{layer}")
        make.linear(f"vace_blocks.{layer}.after_proj", DIM, DIM)
    make.linear("vace_blocks.0.before_proj", DIM, DIM)


def _add_animate(make: _Weights, out_dim: int) -> None:
    """The motion encoder is as large as in the release: ComfyUI builds no other."""
    make.linear("pose_patch_embedding", DIM, out_dim, 1, 2, 2)
    for name, shape in _motion_encoder_shapes().items():
        make.normal(f"motion_encoder.{name}", shape, 0.1 if name.endswith("bias") else 1.0)
    for layer in range(1, HALVINGS + 1):
        for part in ("conv2", "skip"):
            # No weight, but released files have it.
            taps = torch.tensor(BLUR)
            make.tensors[f"motion_encoder.enc.net_app.convs.{layer}.{part}.0.kernel"] = torch.outer(taps, taps) / 64
    for name, rows, columns in (("conv1_local", 4 * FACE_DIM, MOTION_DIM), ("conv2", FACE_DIM, FACE_DIM)):
        make.linear(f"face_encoder.{name}.conv", rows, columns, 3)
    make.linear("face_encoder.conv3.conv", FACE_DIM, FACE_DIM, 3)
    make.linear("face_encoder.out_proj", DIM, FACE_DIM)
    make.normal("face_encoder.padding_tokens", (1, 1, 1, DIM), 1.0)
    for name, rows in (("linear1_kv", 2 * DIM), ("linear1_q", DIM), ("linear2", DIM)):
        make.linear(f"face_adapter.fuser_blocks.0.{name}", rows, DIM)
    for name in ("q_norm", "k_norm"):
        make.ones(f"face_adapter.fuser_blocks.0.{name}.weight", HEAD_DIM)


def _motion_encoder_shapes() -> dict[str, tuple[int, ...]]:
    config = WanConfig(
        dim=DIM, ffn_dim=FFN_DIM, num_heads=DIM // HEAD_DIM, num_layers=ANIMATE_LAYERS, in_dim=36, out_dim=16,
        text_dim=TEXT_DIM, freq_dim=FREQ_DIM, motion_dim=MOTION_DIM,
    )  # fmt: skip
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MotionEncoder(config).named_parameters()}


def lora(seed: int) -> dict[str, Tensor]:
    """A LoRA for `expert()`, with the names and the alpha of the released four-step LoRAs."""
    make = _Weights(seed)
    for layer in range(LAYERS):
        for part in LORA_LAYERS:
            name = f"diffusion_model.blocks.{layer}.{part}"
            make.normal(f"{name}.lora_down.weight", (LORA_RANK, FFN_DIM if part == "ffn.2" else DIM), DIM**-0.5)
            make.normal(f"{name}.lora_up.weight", (FFN_DIM if part == "ffn.0" else DIM, LORA_RANK), 0.1)
            make.tensors[f"{name}.alpha"] = torch.tensor(float(LORA_RANK))
    return make.tensors


def _keep_what_neighbours_share(tensors: dict[str, Tensor], out_dim: int) -> None:
    """Makes the velocity about `x - GROWTH * blur(x)`: what is noise within a neighbourhood shrinks, the rest grows.

    Queries and keys that are constant leave only the rotary position in the attention: it becomes a blur.
    """
    patches = tensors["patch_embedding.weight"]
    embed = torch.linalg.qr(patches[:, :out_dim].reshape(DIM, 4 * out_dim)).Q
    patches[:, :out_dim] = 2 * embed.reshape(DIM, out_dim, 1, 2, 2)
    if patches.shape[1] > out_dim:
        # The picture that an I2V model is given pulls the latents towards itself.
        patches[:, -out_dim:] = -2 * embed.reshape(DIM, out_dim, 1, 2, 2)
    # Behind the last norm the token's channels come in the order row, column, channel.
    out = embed.reshape(DIM, out_dim, 2, 2).permute(2, 3, 1, 0).reshape(4 * out_dim, DIM)
    tensors["head.head.weight"] = (out / 2).contiguous()
    for part in ("q", "k"):
        tensors[f"blocks.0.self_attn.{part}.weight"] *= 0.05
        tensors[f"blocks.0.self_attn.{part}.bias"] = torch.ones(DIM)
        tensors[f"blocks.0.self_attn.norm_{part}.weight"] *= SHARPNESS
    tensors["blocks.0.self_attn.v.weight"] = torch.eye(DIM)
    tensors["blocks.0.self_attn.o.weight"] = torch.eye(DIM)
    modulation = torch.tensor([0.0, 0.0, -GROWTH, 0.0, 0.0, 0.1])
    tensors["blocks.0.modulation"] = 0.1 * tensors["blocks.0.modulation"] + modulation[None, :, None]
    for layer in range(LAYERS):
        for name in ("cross_attn.o.weight", "ffn.2.weight"):
            tensors[f"blocks.{layer}.{name}"] *= 0.1
    tensors["time_projection.1.weight"] *= 0.05


class _Weights:
    """Makes random tensors under their names, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def block(self, name: str) -> None:
        """All that is in each block."""
        self.normal(f"{name}.modulation", (1, 6, DIM), DIM**-0.5)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                self.linear(f"{name}.{attention}.{part}", DIM, DIM)
            for part in ("norm_q", "norm_k"):
                self.ones(f"{name}.{attention}.{part}.weight", DIM)
        self.ones(f"{name}.norm3.weight", DIM)
        self.normal(f"{name}.norm3.bias", (DIM,), 0.02)
        self.linear(f"{name}.ffn.0", FFN_DIM, DIM)
        self.linear(f"{name}.ffn.2", DIM, FFN_DIM)

    def linear(self, name: str, out_dim: int, *in_dims: int) -> None:
        fan_in = torch.Size(in_dims).numel()
        self.normal(f"{name}.weight", (out_dim, *in_dims), fan_in**-0.5)
        self.normal(f"{name}.bias", (out_dim,), 0.02)

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> None:
        self.tensors[name] = torch.randn(shape, generator=self._generator) * std

    def ones(self, name: str, dim: int) -> None:
        self.tensors[name] = torch.ones(dim)
