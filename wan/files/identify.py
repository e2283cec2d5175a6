"""Which model a set of tensor names belongs to, and which expert a name promises."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

# In order: the first whose every marker ends some name decides.
_MARKERS = (
    ("a LoRA", (".lora_down.weight",)),
    ("a LoRA", (".lora_A.weight",)),
    ("a LoRA", (".lora_A.default.weight",)),
    ("a Wan DiT checkpoint (diffusion model)", ("head.modulation", "patch_embedding.weight")),
    ("a Wan DiT checkpoint (diffusion model) in diffusers names", ("condition_embedder.time_proj.weight",)),
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


# A part of a tensor's name -> the variant of the Wan transformer that has it, and that this pack does not run.
_VARIANTS = {
    "vace_blocks": "a Wan VACE transformer",
    "vace_patch_embedding": "a Wan VACE transformer",
    "control_adapter": "a Wan Fun-Camera or Fun-Control transformer",
    "ref_conv": "a Wan Fun-Control transformer",
    "casual_audio_encoder": "a Wan S2V transformer",
    "audio_injector": "a Wan S2V transformer",
    "trainable_cond_mask": "a Wan S2V transformer",
    "audio_proj": "a Wan transformer with an audio branch (S2V, MultiTalk, HuMo)",
    "audio_cross_attn": "a Wan transformer with an audio branch (S2V, MultiTalk, HuMo)",
    "face_adapter": "a Wan Animate transformer",
    "motion_encoder": "a Wan Animate transformer",
    "pose_patch_embedding": "a Wan Animate transformer",
    "emb_pos": "a Wan2.1 FLF2V transformer",
    "img_emb": "a Wan2.1 I2V transformer",
    "k_img": "a Wan2.1 I2V transformer",
}
_CHANNELS = {(16, 16): "T2V", (36, 16): "I2V", (48, 48): "TI2V-5B"}
"""Latent channels in and out of the models that this pack runs."""
RUNNABLE = "a Wan2.2 transformer (T2V, I2V or TI2V-5B)"


def wan_variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Names a Wan transformer that this pack does not run, by its tensors (official names); None for one it runs."""
    parts = {part for name in shapes for part in name.split(".")}
    for part, variant in _VARIANTS.items():
        if part in parts:
            return variant
    embedding, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(embedding) != 5 or len(head) != 2 or (embedding[1], head[0] // 4) in _CHANNELS:
        return None
    channels = f"{embedding[1]} latent channels in and {head[0] // 4} out"
    if head[0] // 4 == 16 and embedding[1] in (32, 48, 52):
        return f"a Wan Fun-Control or camera transformer ({channels})"
    allowed = ", ".join(f"{i} and {o} ({task})" for (i, o), task in _CHANNELS.items())
    return f"a Wan variant with {channels}, not one of {allowed}"


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
