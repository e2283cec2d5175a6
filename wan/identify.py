"""Which model a set of tensor names belongs to, for messages about the wrong file. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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


# A tensor's first part -> the variant of the Wan transformer that has it, and that this pack does not run.
_VARIANTS = {
    "vace_blocks": "a Wan VACE transformer",
    "vace_patch_embedding": "a Wan VACE transformer",
    "control_adapter": "a Wan Fun-Control transformer",
    "ref_conv": "a Wan Fun-Control transformer",
    "casual_audio_encoder": "a Wan S2V transformer",
    "audio_injector": "a Wan S2V transformer",
    "audio_proj": "a Wan S2V transformer",
    "face_adapter": "a Wan Animate transformer",
    "motion_encoder": "a Wan Animate transformer",
    "pose_patch_embedding": "a Wan Animate transformer",
    "img_emb": "a Wan2.1 I2V transformer",
}
_INPUTS = {36: "a Wan I2V transformer", 48: "a Wan2.2 TI2V-5B transformer"}


def wan_variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Names a Wan transformer that is not a plain T2V one, by its tensors (official names); None for T2V."""
    for name in shapes:
        if name.partition(".")[0] in _VARIANTS:
            return _VARIANTS[name.partition(".")[0]]
    channels = shapes["patch_embedding.weight"][1] if len(shapes.get("patch_embedding.weight", ())) == 5 else 16
    return None if channels == 16 else _INPUTS.get(channels, f"a Wan variant with {channels} input channels")
