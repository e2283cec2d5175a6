"""Names of the transformer's tensors in diffusers -> the official ones."""

from __future__ import annotations

import re

MARKER = "condition_embedder.time_proj.weight"
"""A tensor that every Wan transformer in diffusers' names has."""

_BLOCK = re.compile(r"((?:vace_)?blocks\.\d+)\.(.+)")

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


def to_official(name: str) -> str:
    """diffusers' name of a tensor or module -> the official one; a name that diffusers does not have stays as it is."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _renamed(name, _ROOT)
    block, rest = match.groups()
    return f"{block}.{_renamed(rest, _IN_BLOCK)}"


def _renamed(name: str, table: dict[str, str]) -> str:
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else name
