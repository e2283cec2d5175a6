"""The table of variants: what a header is taken for, what is refused by name, and that nothing else knows."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
import torch
from mount import ROOT
from tiny import TINY
from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
from wan_pack.distributed.job.control_inputs import CONTROLS
from wan_pack.wan.model.config import MAX_LAYERS, WanConfig, config_from_shapes
from wan_pack.wan.model.latent_space import TEMPORAL_STRIDE
from wan_pack.wan.model.variants import (
    CONTROL,
    FRAMES,
    MASK,
    REFUSED,
    VARIANTS,
    Refused,
    Variant,
    check_runs,
    takers,
    variant_of,
)
from wan_pack.wan.sampling.image_channels import CHANNELS
from wan_pack.wan.transformer.transformer import WanModel

ANIMATE = ("pose_video_latent", "face_video_pixels", "face_video_pixels_null")


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanModel(config).named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_header_is_taken_for_its_row(variant: Variant):
    config = replace(TINY, in_dim=variant.channels[0], out_dim=variant.channels[1], parts=variant.parts)
    config = replace(config, vace_layers=(0,) if variant.controlled else (), face_blocks=1)
    shapes = shapes_of(config)
    check_runs(shapes)
    assert config_from_shapes(shapes, num_heads=TINY.num_heads).variant is variant


@pytest.mark.parametrize("row", REFUSED, ids=[row.name for row in REFUSED])
def test_what_does_not_run_is_refused_by_its_name(row: Refused):
    shapes = shapes_of(TINY)
    told = [{**shapes, f"blocks.1.{part}.weight": (4,)} for part in row.parts]
    told += [{**shapes, "patch_embedding.weight": (32, n, 1, 2, 2), "head.head.weight": (4 * m, 32)}
             for n, m in row.channels]  # fmt: skip
    assert told
    for header in told:
        with pytest.raises(ValueError, match=r"expected a Wan transformer \(T2V, ") as refusal:
            check_runs(header)
        assert row.name in str(refusal.value)


def test_a_variant_without_a_row_is_refused_by_its_channels():
    shapes = shapes_of(replace(TINY, in_dim=17))
    with pytest.raises(ValueError, match=r"17 latent channels in and 16 out, not one of 16 .* and 16 out \(T2V\)"):
        check_runs(shapes)
    with pytest.raises(ValueError, match="with 16 latent channels in and 16 out and emb_pos, img_emb, ref_conv, not"):
        variant_of((16, 16), frozenset({"ref_conv", "img_emb", "emb_pos"}))


def test_models_have_names_for_people():
    assert [config.describe() for config in WAN_CONFIGS.values()] == [
        *("T2V 14B", "I2V 14B", "VACE 14B", "Animate 14B", "TI2V-5B 5B", "T2V 1.3B", "VACE 1.3B")
    ]
    assert TINY.describe() == "T2V of 2 layers and 32 channels"
    deeper = replace(WAN_CONFIGS["t2v-A14B"], num_layers=41)
    assert WAN_CONFIGS["t2v-A14B"].differences(deeper) == " (num_layers 40 and 41)"
    assert deeper.differences(TINY) == ""
    assert takers("noise_mask") == "TI2V-5B, Fun-InP 5B, Fun-Control 5B, Fun-Camera 5B"


def test_no_other_file_asks_for_a_variant():
    """By its name, its task or its channels: what is asked of a model is a field of its row."""
    for folder in ("nodes", "distributed", "wan"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = list(ast.walk(node)) if isinstance(node, ast.Compare) else []
                constants = {part.value for part in parts if isinstance(part, ast.Constant)}
                channels = {part.attr for part in parts if isinstance(part, ast.Attribute)} & {"in_dim", "out_dim"}
                assert not constants & {"t2v", "i2v", "ti2v", *VARIANTS}, f"{path}:{node.lineno}"
                assert not (channels and constants), f"{path}:{node.lineno}"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_a_variant_is_given_follows_from_what_it_is(variant: Variant):
    """Pictures as channels, in any of three forms; CLIP's features for an image branch; controls for VACE."""
    expected = {"image_conditioning"} if variant.image_channels else set()
    expected |= {"start_image"} if variant.image_channels and not variant.frames_in_front else set()
    expected |= {"end_image"} if FRAMES in variant.image and not variant.frames_in_front else set()
    expected |= set(ANIMATE) if "face_adapter" in variant.parts else set()
    expected |= {"control_video"} if CONTROL in variant.image else set()
    expected |= {"reference_images", "reference_latent"} if "ref_conv" in variant.parts else set()
    expected |= {"clip_features"} if "img_emb" in variant.parts else set()
    expected |= {"camera_conditions"} if "control_adapter" in variant.parts else set()
    others = {"reference_latent", "camera_conditions", *ANIMATE}
    expected |= set(CONTROLS) - others if variant.controlled else set()
    expected |= {"start_image", "noise_mask"} if variant.known_frames else set()
    assert set(variant.takes) == expected
    inputs, out = variant.channels
    assert inputs == out + sum(TEMPORAL_STRIDE if name == MASK else out for name in variant.image)
    assert set(variant.image) <= CHANNELS.keys()


@pytest.mark.parametrize(("field", "value"), [("ffn_dim", 0), ("num_layers", 0), ("in_dim", -1), ("clip_dim", 0)])
def test_sizes_are_at_least_one(field: str, value: int):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be at least 1"):
        replace(TINY, **{field: value})


def test_sizes_that_a_file_cannot_have_are_refused():
    shapes = shapes_of(replace(TINY, dim=128, num_heads=1))
    with pytest.raises(ValueError, match=r"tensor vace_patch_embedding\.weight has shape \(3,\); it must have more"):
        config_from_shapes({**shapes, "vace_patch_embedding.weight": (3,)})
    many = {f"blocks.{i}.x": (1,) for i in range(MAX_LAYERS + 1)}
    with pytest.raises(ValueError, match="it has 1001 blocks; at most 1000 are read"):
        config_from_shapes({**shapes, **many})


PARTS_OF_OTHERS = {
    "a Wan S2V transformer": ("casual_audio_encoder", "audio_injector", "trainable_cond_mask"),
    "a Wan transformer with an audio branch": ("audio_proj", "audio_cross_attn"),
    "a Wan SCAIL-2 transformer": ("patch_embedding_mask",),
    "a Wan SCAIL transformer": ("patch_embedding_pose",),
    "a SkyReels DF": ("fps_embedding", "fps_projection"),
    "a Wan transformer with Lynx adapters": ("ip_adapter", "ref_adapter", "to_k_ip", "to_k_ref"),
    "a Wan transformer with Stand-In merged": ("q_loras", "k_loras", "v_loras"),
    "a Wan transformer with a Uni3C controlnet": ("controlnet", "controlnet_patch_embedding", "controlnet_blocks"),
    "a Wan transformer with video sparse attention": ("to_gate_compress",),
    "a ReCamMaster transformer": ("cam_encoder",),
    "a UniAnimate transformer": ("dwpose_embedding", "randomref_embedding_pose"),
    "a FlashVSR transformer": ("LQ_proj_in",),
}


@pytest.mark.parametrize("name", PARTS_OF_OTHERS)
def test_a_model_that_does_not_run_is_named_by_any_of_its_parts(name: str):
    for part in PARTS_OF_OTHERS[name]:
        for tensor in (f"{part}.weight", f"blocks.0.{part}.weight", f"blocks.0.self_attn.{part}.0.bias"):
            with pytest.raises(ValueError, match=f"^it is {re.escape(name)}.*; expected a"):
                check_runs({"blocks.0.ffn.0.weight": (8, 8), tensor: (8, 8)})
        # A part is a whole word of a name.
        check_runs({f"blocks.0.un{part}.weight": (8, 8)})


def test_experts_change_where_the_official_code_has_it():
    """0.875 for text, 0.9 where a picture or a control video is given; those of one transformer have no such place."""
    found = {name: variant.boundary for name, variant in VARIANTS.items() if variant.boundary is not None}
    assert found == {"T2V": 0.875, "VACE": 0.875} | dict.fromkeys(("I2V", "Fun-Control", "Fun-Camera"), 0.9)
