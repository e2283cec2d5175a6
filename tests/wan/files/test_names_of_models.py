"""What a set of tensors is called, and what stands before a model's names."""

from __future__ import annotations

import pytest
from wan_pack.wan.files.diffusers_keys import to_official
from wan_pack.wan.files.identify import describe_tensors, prefixes

MODELS = {
    "a LoRA": [
        ["blocks.0.ffn.0.lora_down.weight", "blocks.0.ffn.0.lora_up.weight"],
        ["transformer.blocks.0.attn1.to_q.lora_A.weight"],
        ["pipe.dit.blocks.0.self_attn.q.lora_A.default.weight"],
    ],
    "a Stand-In LoRA": [["blocks.0.self_attn.q_loras.down.weight", "head.modulation", "patch_embedding.weight"]],
    "a Wan DiT checkpoint (diffusion model)": [["model.head.modulation", "model.patch_embedding.weight"]],
    "a Wan DiT checkpoint (diffusion model) in diffusers names": [
        ["condition_embedder.time_proj.weight", "patch_embedding.weight"]
    ],
    "a Uni3C controlnet": [["controlnet_patch_embedding.weight"]],
    "a Lynx adapter": [["0.to_k_ip.weight"], ["blocks.0.to_k_ref.weight"]],
    "a tiny VAE for previews (TAEHV)": [["decoder.1.weight", "decoder.3.conv.0.weight"]],
    "a Wan2.2 VAE": [["decoder.upsamples.0.upsamples.0.residual.2.weight", "decoder.middle.0.residual.0.gamma"]],
    "a Wan2.2 VAE in diffusers names": [["decoder.up_blocks.0.upsampler.resample.1.weight"]],
    "a Wan2.1 VAE": [["vae.decoder.upsamples.0.residual.2.weight", "vae.decoder.middle.0.residual.0.gamma"]],
    "a Wan2.1 VAE in diffusers names": [["decoder.up_blocks.0.upsamplers.0.resample.1.weight", "norm_out.gamma"]],
    "a umT5 text encoder": [
        ["blocks.0.pos_embedding.embedding.weight"],
        ["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
         "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
    ],
    "a T5 text encoder in GGUF": [["enc.blk.0.attn_q.weight"]],
    "a language model in GGUF": [["blk.0.attn_q.weight"]],
    "a T5 text encoder, not a umT5": [["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]],
    "a CLIP model": [
        ["text_model.embeddings.token_embedding.weight", "vision_model.embeddings.class_embedding"],
        ["transformer.resblocks.0.attn.in_proj_weight"],
    ],
    "a CLIP vision model": [
        ["vision_model.embeddings.class_embedding"],
        ["visual.cls_embedding"],
        ["embeddings.class_embedding", "pre_layrnorm.weight"],
    ],
    "a SigLIP vision model": [["vision_model.embeddings.patch_embedding.bias"]],
    "a DINOv2 vision model": [["encoder.layer.0.layer_scale2.lambda1"]],
    "another diffusion model": [
        ["double_blocks.0.img_attn.qkv.weight"],
        ["model.diffusion_model.input_blocks.0.0.weight"],
    ],
    "an image VAE": [["decoder.mid.block_1.conv1.weight", "decoder.conv_in.weight", "encoder.conv_in.weight"]],
    "another VAE": [["decoder.conv_in.weight", "encoder.conv_in.weight"]],
    "a causal language model": [["model.layers.0.self_attn.q_proj.weight"]],
    "a file without tensors": [[]],
    "a file of 4 tensors such as a, b, c": [["d", "b", "a", "c"]],
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_called_by_what_it_is(kind: str) -> None:
    for names in MODELS[kind]:
        assert describe_tensors(names) == kind
        # Others beside it change nothing.
        assert not names or "such as" in kind or describe_tensors(["a.other", *names]) == kind


@pytest.mark.parametrize(
    "names", [names for kind, every in MODELS.items() for names in every if len(names) == 2 and "DiT" not in kind]
)
def test_half_of_what_a_model_is_known_by_makes_it_another(names: list[str]) -> None:
    whole = describe_tensors(names)
    assert whole not in (describe_tensors(names[:1]), describe_tensors(names[1:])) or whole in (
        "a LoRA", "a Wan2.2 VAE", "a CLIP model", "a umT5 text encoder"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["head.modulation"], [""]),
        (["model.head.modulation", "model.x"], ["model."]),
        ([f"{prefix}head.modulation" for prefix in ("b.", "a.", "long.", "")], ["", "a.", "b.", "long."]),
        (["overhead.modulation"], []),
        (["a.time", "a.head.modulation"], ["a."]),
        (["a.head.modulation.b"], []),
    ],
)  # fmt: skip
def test_what_stands_before_names_ends_with_a_dot(names: list[str], found: list[str]) -> None:
    assert prefixes(names, ("head.modulation", "time")) == found


DIFFUSERS = {
    "patch_embedding.weight": "patch_embedding.weight",
    "condition_embedder.text_embedder.linear_1.weight": "text_embedding.0.weight",
    "condition_embedder.text_embedder.linear_2.bias": "text_embedding.2.bias",
    "condition_embedder.time_embedder.linear_1.weight": "time_embedding.0.weight",
    "condition_embedder.time_embedder.linear_2.weight": "time_embedding.2.weight",
    "condition_embedder.time_proj.weight_scale": "time_projection.1.weight_scale",
    "condition_embedder.image_embedder.norm1.weight": "img_emb.proj.0.weight",
    "condition_embedder.image_embedder.ff.net.0.proj.weight": "img_emb.proj.1.weight",
    "condition_embedder.image_embedder.ff.net.2.weight": "img_emb.proj.3.weight",
    "condition_embedder.image_embedder.norm2.weight": "img_emb.proj.4.weight",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out.weight": "head.head.weight",
    "scale_shift_table": "head.modulation",
    "blocks.3.scale_shift_table": "blocks.3.modulation",
    "blocks.12.attn1.to_out.0.bias": "blocks.12.self_attn.o.bias",
    "blocks.0.attn2.add_k_proj.weight": "blocks.0.cross_attn.k_img.weight",
    "blocks.0.attn2.add_v_proj.weight": "blocks.0.cross_attn.v_img.weight",
    "blocks.0.attn2.norm_added_k.weight": "blocks.0.cross_attn.norm_k_img.weight",
    "blocks.0.norm2.weight": "blocks.0.norm3.weight",
    "blocks.0.ffn.net.0.proj.weight": "blocks.0.ffn.0.weight",
    "blocks.0.ffn.net.2.weight": "blocks.0.ffn.2.weight",
    "vace_blocks.1.proj_in.weight": "vace_blocks.1.before_proj.weight",
    "vace_blocks.1.proj_out.bias": "vace_blocks.1.after_proj.bias",
    "face_adapter.7.to_q.weight": "face_adapter.fuser_blocks.7.linear1_q.weight",
    "face_adapter.10.to_k.weight_scale": "face_adapter.fuser_blocks.10.linear1_kv.k.weight_scale",
    "face_adapter.0.to_v.bias": "face_adapter.fuser_blocks.0.linear1_kv.v.bias",
    "face_adapter.0.to_out.bias": "face_adapter.fuser_blocks.0.linear2.bias",
    "face_adapter.0.norm_q.weight": "face_adapter.fuser_blocks.0.q_norm.weight",
    "face_adapter.0.norm_k.weight": "face_adapter.fuser_blocks.0.k_norm.weight",
    "face_adapter.0.other.weight": "face_adapter.0.other.weight",
    "face_adapter.fuser_blocks.0.linear2.weight": "face_adapter.fuser_blocks.0.linear2.weight",
    "face_encoder.conv1_local.weight": "face_encoder.conv1_local.conv.weight",
    "face_encoder.conv2.conv.weight": "face_encoder.conv2.conv.weight",
    "face_encoder.conv3.bias": "face_encoder.conv3.conv.bias",
    "face_encoder.out_proj.weight": "face_encoder.out_proj.weight",
    "face_encoder.padding_tokens": "face_encoder.padding_tokens",
    "motion_encoder.conv_in.weight": "motion_encoder.enc.net_app.convs.0.0.weight",
    "motion_encoder.conv_in.act_fn.bias": "motion_encoder.enc.net_app.convs.0.1.bias",
    "motion_encoder.res_blocks.0.conv1.weight": "motion_encoder.enc.net_app.convs.1.conv1.0.weight",
    "motion_encoder.res_blocks.2.conv1.act_fn.bias": "motion_encoder.enc.net_app.convs.3.conv1.1.bias",
    "motion_encoder.res_blocks.6.conv2.weight": "motion_encoder.enc.net_app.convs.7.conv2.1.weight",
    "motion_encoder.res_blocks.6.conv2.act_fn.bias": "motion_encoder.enc.net_app.convs.7.conv2.2.bias",
    "motion_encoder.res_blocks.6.conv_skip.weight": "motion_encoder.enc.net_app.convs.7.skip.1.weight",
    "motion_encoder.res_blocks.7.conv1.weight": "motion_encoder.res_blocks.7.conv1.weight",
    "motion_encoder.conv_out.weight": "motion_encoder.enc.net_app.convs.8.weight",
    "motion_encoder.motion_network.4.bias": "motion_encoder.enc.fc.4.bias",
    "motion_encoder.motion_synthesis_weight": "motion_encoder.dec.direction.weight",
    "pose_patch_embedding.weight": "pose_patch_embedding.weight",
    "blocks.x.attn1.to_q.weight": "blocks.x.attn1.to_q.weight",
    "blocks.0.self_attn.q.weight": "blocks.0.self_attn.q.weight",
    "other": "other",
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_names_become_the_official_ones(name: str) -> None:
    assert to_official(name) == DIFFUSERS[name]
    module, dot, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        # Modules, and what quantised files put behind a weight.
        assert to_official(module) == DIFFUSERS[name].removesuffix(f"{dot}{leaf}")
