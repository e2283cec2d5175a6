"""Names of the transformer's tensors in diffusers -> the official ones."""

from __future__ import annotations

import re

MARKER = "condition_embedder.time_proj.weight"
"""A tensor that every Wan transformer in diffusers' names has."""

_BLOCK = re.compile(r"((?:vace_)?blocks\.\d+)\.(.+)")
_FACE_BLOCK = re.compile(r"face_adapter\.(\d+)\.(.+)")

# diffusers module or parameter -> official one; a tensor's last part (weight, bias, weight_scale, ...) stays as it is.
_ROOT = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    # Of Animate.
    **{
        name: f"face_encoder.{conv}.conv"
        for conv in ("conv1_local", "conv2", "conv3")
        # The official name too, which goes on like the other.
        for name in (f"face_encoder.{conv}", f"face_encoder.{conv}.conv")
    },
    **{f"motion_encoder.motion_network.{i}": f"motion_encoder.enc.fc.{i}" for i in range(5)},
    "motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
    "motion_encoder.conv_in": "motion_encoder.enc.net_app.convs.0.0",
    "motion_encoder.conv_in.act_fn": "motion_encoder.enc.net_app.convs.0.1",
    "motion_encoder.conv_out": "motion_encoder.enc.net_app.convs.8",
    **{
        f"motion_encoder.res_blocks.{i}.{theirs}": f"motion_encoder.enc.net_app.convs.{i + 1}.{ours}"
        for i in range(7)
        for theirs, ours in (
            ("conv1", "conv1.0"),
            ("conv1.act_fn", "conv1.1"),
            # A blur without weights is in front.
            ("conv2", "conv2.1"),
            ("conv2.act_fn", "conv2.2"),
            ("conv_skip", "skip.1"),
        )
    },
}
_IN_BLOCK = {
    **{
        f"{theirs}.{module}": f"{ours}.{name}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for module, name in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("add_k_proj", "k_img"),
            ("add_v_proj", "v_img"),
            ("norm_added_k", "norm_k_img"),
        )
    },
    # Theirs counts the norms with parameters in another order.
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
    # Of VACE's blocks.
    "proj_in": "before_proj",
    "proj_out": "after_proj",
}
IN_FACE_BLOCK = {
    "to_q": "linear1_q",
    # One layer in the official code; its halves are called so here.
    "to_k": "linear1_kv.k",
    "to_v": "linear1_kv.v",
    "to_out": "linear2",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
HALF = re.compile(r"(face_adapter\.fuser_blocks\.\d+\.linear1_kv)\.([kv])(.*)")
"""An official layer, which of its halves a name is of (the keys' rows are in front), and what is behind it."""
OFFICIAL_ALONE = re.compile(r"(?:motion_encoder\.(?:enc|dec)|face_adapter\.fuser_blocks|face_encoder\.conv\w+\.conv)\.")
"""How names begin that diffusers has others for, of the parts that it splits or shapes in another way."""


def to_official(name: str) -> str:
    """diffusers' name of a tensor or module -> the official one; a name that diffusers does not have stays as it is."""
    if match := _BLOCK.fullmatch(name):
        return f"{match[1]}.{_renamed(match[2], _IN_BLOCK)}"
    if match := _FACE_BLOCK.fullmatch(name):
        official = _renamed(match[2], IN_FACE_BLOCK)
        return name if official == match[2] else f"face_adapter.fuser_blocks.{match[1]}.{official}"
    return _renamed(name, _ROOT)


def whole(own: str) -> str:
    """The official tensor or module that something, by the name that `to_official` gives it, is or is half of."""
    half = HALF.fullmatch(own)
    return own if half is None else f"{half[1]}{half[3]}"


def _renamed(name: str, table: dict[str, str]) -> str:
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else name
