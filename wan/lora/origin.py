"""Which model a LoRA looks made for, by its names and sizes, for messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ..model.variants import SIZES, VARIANTS

_WAN_MODULE = re.compile(
    r"(?:^|[._])(?<!transformer_)(?<!double_)(?<!single_)blocks[._]\d+[._]"
    r"(?:(?:self_attn|cross_attn)[._](?:[qkvo]|[kv]_img|norm_[qk]|norm_k_img)\.|attn[12][._](?:to|add|norm)_|ffn[._]"
    r"|norm3\.|diff_m$|modulation|scale_shift_table)|patch_embedding"
)
_IMAGE_BRANCH = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")

# In order: the first that some name matches decides.
_OTHERS = (
    ("Flux, Chroma or HunyuanVideo", r"(?:double|single|single_transformer)_blocks[._]\d"),
    ("Qwen-Image or Stable Diffusion 3", r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|attn[._](?:to|add)_)"),
    ("Stable Diffusion 3", r"joint_blocks[._]\d"),
    ("Stable Diffusion", r"(?:down|up|input|output)_blocks[._]\d|mid_block|middle_block"),
    ("LTX-Video or CogVideoX", r"transformer_blocks[._]\d+[._]attn1"),
    ("Cosmos", r"blocks[._]\d+[._](?:self|cross)_attn[._][qkv]_proj"),
    ("Z-Image or Lumina", r"layers[._]\d+[._](?:attention|feed_forward)"),
    ("a language model", r"layers[._]\d+[._](?:self_attn|mlp)[._][a-z]+_proj"),
    ("a text encoder", r"^(?:lora_te|text_encoder)"),
)


def describe_origin(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names the model that a LoRA's (or a Wan transformer's own) tensors belong to, as far as they tell."""
    if any("vace_blocks" in name for name in shapes):
        return "a Wan VACE model"
    if any(_WAN_MODULE.search(name) for name in shapes):
        return _describe_wan(shapes)
    for model, pattern in _OTHERS:
        if not any(re.search(pattern, name) for name in shapes):
            continue
        if model == "Stable Diffusion":
            # The width of the text that cross-attention takes: 2048 in SDXL, 768 and 1024 before it.
            xl = any(2048 in shape for shape in shapes.values()) or any("lora_te2" in name for name in shapes)
            return "SDXL" if xl else "Stable Diffusion 1.5 or 2"
        return model
    return "a model that this pack does not know"


def _describe_wan(shapes: Mapping[str, tuple[int, ...]]) -> str:
    sizes = Counter(size for shape in shapes.values() for size in shape)
    dims = sorted((dim for dim in SIZES if sizes[dim]), key=lambda dim: -sizes[dim])
    if not dims:
        return "a Wan model of an unreleased size"
    if any(_IMAGE_BRANCH.search(name) for name in shapes):
        return f"Wan2.1 I2V {SIZES[dims[0]]}"
    named = [row for row in VARIANTS.values() if dims[0] in row.releases and not row.parts]
    told = [row for row in named if row.channels[0] == _input_channels(shapes)]
    if not told and len(named) > 1:
        return f"a Wan {SIZES[dims[0]]} model ({' or '.join(row.name for row in named)})"
    return (told or named)[0].releases[dims[0]]


def _input_channels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Of the patch embedding, where the tensors change it."""
    for name, shape in shapes.items():
        if "patch_embedding" not in name or "up" in name or "lora_B" in name:
            continue
        if len(shape) == 5:
            return shape[1]
        # A low-rank factor of the 1x2x2 convolution as a matrix.
        if len(shape) == 2 and shape[1] % 4 == 0:
            return shape[1] // 4
    return None
