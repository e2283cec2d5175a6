"""Which model a set of tensor names belongs to, and which expert a name promises."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

# In order: the first whose every marker ends some name decides.
_MARKERS = (
    ("a LoRA", (".lora_down.weight",)),
    ("a LoRA", (".lora_A.weight",)),
    ("a LoRA", (".lora_A.default.weight",)),
    ("a Stand-In LoRA", (".self_attn.q_loras.down.weight",)),
    ("a Wan DiT checkpoint (diffusion model)", ("head.modulation", "patch_embedding.weight")),
    ("a Wan DiT checkpoint (diffusion model) in diffusers names", ("condition_embedder.time_proj.weight",)),
    ("a Uni3C controlnet", ("controlnet_patch_embedding.weight",)),
    ("a Lynx adapter", (".to_k_ip.weight",)),
    ("a Lynx adapter", (".to_k_ref.weight",)),
    ("a tiny VAE for previews (TAEHV)", ("decoder.1.weight", "decoder.3.conv.0.weight")),
    ("a Wan2.2 VAE", ("decoder.upsamples.0.upsamples.0.residual.2.weight",)),
    ("a Wan2.2 VAE in diffusers names", ("decoder.up_blocks.0.upsampler.resample.1.weight",)),
    ("a Wan2.1 VAE", ("decoder.upsamples.0.residual.2.weight", "decoder.middle.0.residual.0.gamma")),
    ("a Wan2.1 VAE in diffusers names", ("decoder.up_blocks.0.upsamplers.0.resample.1.weight", "norm_out.gamma")),
    ("a umT5 text encoder", ("blocks.0.pos_embedding.embedding.weight",)),
    ("a umT5 text encoder", ("block.1.layer.0.SelfAttention.relative_attention_bias.weight",)),
    ("a T5 text encoder in GGUF", ("enc.blk.0.attn_q.weight",)),
    ("a language model in GGUF", ("blk.0.attn_q.weight",)),
    ("a T5 text encoder, not a umT5", ("block.0.layer.0.SelfAttention.relative_attention_bias.weight",)),
    ("a CLIP model", ("text_model.embeddings.token_embedding.weight",)),
    ("a CLIP vision model", ("vision_model.embeddings.class_embedding",)),
    ("a CLIP vision model", ("visual.cls_embedding",)),
    ("a CLIP vision model", ("embeddings.class_embedding", "pre_layrnorm.weight")),
    ("a CLIP model", ("transformer.resblocks.0.attn.in_proj_weight",)),
    ("a SigLIP vision model", ("vision_model.embeddings.patch_embedding.bias",)),
    ("a DINOv2 vision model", ("encoder.layer.0.layer_scale2.lambda1",)),
    ("another diffusion model", ("double_blocks.0.img_attn.qkv.weight",)),
    ("another diffusion model", ("model.diffusion_model.input_blocks.0.0.weight",)),
    ("an image VAE", ("decoder.mid.block_1.conv1.weight",)),
    ("another VAE", ("decoder.conv_in.weight", "encoder.conv_in.weight")),
    ("a causal language model", ("layers.0.self_attn.q_proj.weight",)),
)


def describe_tensors(names: Collection[str]) -> str:
    """Names a model by its tensors' names: "a Wan2.1 VAE", "a LoRA", ..., else how many tensors, with examples."""
    for kind, markers in _MARKERS:
        if all(any(name.endswith(marker) for name in names) for marker in markers):
            return kind
    if not names:
        return "a file without tensors"
    return f"a file of {len(names)} tensors such as {', '.join(sorted(names)[:3])}"


def prefixes(names: Collection[str], markers: Collection[str]) -> list[str]:
    """What stands before a model's names, found by a tensor that each such model has once; the shortest first.

    "" for bare names; "model.diffusion_model.", "vae." and others, by who saved the file.
    """
    found = {name.removesuffix(marker) for marker in markers for name in names if name.endswith(marker)}
    return sorted((prefix for prefix in found if prefix in ("", f"{prefix[:-1]}.")), key=lambda p: (len(p), p))


_NOISE = re.compile(r"(?<![a-z])(high|low)[ _.-]?noise", re.IGNORECASE)
_SIDE = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_DIFFUSERS_FOLDERS = {"transformer": "high", "transformer_2": "low"}


def noise_side(path: str | Path) -> str | None:
    """Which expert a file or folder looks like by its name or its folder's: "high", "low", or None.

    By name only: the two experts have the same tensors.
    """
    path = Path(path)
    for name in (path.name, path.parent.name):
        for pattern in (_NOISE, _SIDE):
            sides = {side.lower() for side in pattern.findall(name)}
            if len(sides) == 1:
                return sides.pop()
        if name in _DIFFUSERS_FOLDERS:
            return _DIFFUSERS_FOLDERS[name]
    return None
