"""What is read from a LoRA file's header: whom it fits, what is left out, how strong it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lora_families import ALPHA, LOW_RANK, RANK, TARGETS, A, B, dotted, in_diffusers, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.origin import describe_origin
from wan_pack.wan.lora.updates import LowRank
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.transformer.transformer import WanModel

Q = "blocks.0.self_attn.q"


def scale(path: Path, module: str = Q) -> float:
    """Factor of up @ down, at strength 1."""
    (update,) = (u for u in Lora(path, 1, TARGETS).updates[f"{module}.weight"] if isinstance(u, LowRank))
    return update.scale


def matrices(module: str, out: int = 32, width: int = 32, rank: int = 2, **more: Tensor) -> dict[str, Tensor]:
    tensors = {"lora_down.weight": torch.zeros(rank, width), "lora_up.weight": torch.zeros(out, rank), **more}
    return {f"{module}.{role}": tensor for role, tensor in tensors.items()}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def refusal(path: Path, tensors: dict[str, Tensor], targets: dict[str, tuple[int, ...]] = TARGETS) -> str:
    with pytest.raises(ValueError, match=r"l\.safetensors cannot be used as a LoRA: ") as caught:
        Lora(saved(path / "l.safetensors", tensors), 1, targets)
    return str(caught.value).partition(": ")[2]


def model_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in WanModel(config).named_parameters()}


def test_what_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = matrices(Q) | {f"{Q}.lora_up.weight": torch.zeros(32, 2, dtype=torch.int8)}
    assert refusal(tmp_path, whole) == f"{Q}.lora_up.weight is torch.int8; it must be of a float dtype"
    monkeypatch.setattr(Lora, "_plan", Mock(side_effect=OSError(5, "Input/output error")))
    assert "Input/output error" in refusal(tmp_path, matrices(Q))


PEFT = {"r": RANK, "lora_alpha": 6, "use_rslora": False, "alpha_pattern": {}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PEFT, 6 / RANK),
        (PEFT | {"use_rslora": True}, 6 / RANK**0.5),
        (PEFT | {"alpha_pattern": {"self_attn.k": 1, "self_attn.q": 3}}, 3 / RANK),
        (PEFT | {"alpha_pattern": {"^blocks.0.self_attn.q$": 5.0}}, 5 / RANK),
        (PEFT | {"alpha_pattern": {"attn.q": 3}}, 6 / RANK),
        (PEFT | {"alpha_pattern": {"q": 3, "self_attn.q": 4}}, 3 / RANK),
        (PEFT | {"alpha_pattern": {"self_attn.q": 4, "q": 3}}, 4 / RANK),
        ({}, 1),
    ],
)
def test_pefts_own_config_gives_the_alpha(tmp_path: Path, settings: dict[str, Any], expected: float):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = write(tmp_path / "adapter_model.safetensors", dotted("base_model.model."), down=A, up=B, alpha=None)
    assert scale(path) == pytest.approx(expected)
    source = "alpha from adapter_config.json" if settings else f"{len(LOW_RANK)} without alpha, taken as the rank"
    assert Lora(path, 1, TARGETS).report().endswith(f"; {source}")
    # Beside a file of another name it is another LoRA's.
    assert scale(path.rename(tmp_path / "mine.safetensors")) == 1


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_a_lora_that_began_with_no_change_is_taken(tmp_path: Path, start: bool | str | None):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | {"init_lora_weights": start}))
    path = write(tmp_path / "adapter_model.safetensors", dotted("base_model.model."), down=A, up=B, alpha=None)
    assert scale(path) == pytest.approx(6 / RANK)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "later", [1]])
def test_a_lora_made_for_a_changed_base_model_is_refused(tmp_path: Path, start: Any):
    """PEFT took its factors out of the weights: added to the whole weights they ruin the model."""
    metadata = {
        "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.init_lora_weights": start})
    }
    path = write(tmp_path / "l.safetensors", dotted("transformer."), down=A, up=B, alpha=None, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"metadata lora_adapter_metadata cannot be used: init_lora_weights is .*plain LoRA"
    ):
        Lora(path, 1, TARGETS)


def test_metadata_gives_the_alpha_of_each_expert(tmp_path: Path):
    names = {f"{t}.{key}": value for t, alpha in (("transformer", 6), ("transformer_2", 8))
             for key, value in (("lora_alpha", alpha), ("r", RANK))}  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps(names)}
    for prefix, alpha in (("transformer.", 6), ("transformer_2.", 8)):
        spell = dotted(prefix, in_diffusers)
        path = write(tmp_path / "l.safetensors", spell, down=A, up=B, alpha=None, metadata=metadata)
        assert scale(path) == pytest.approx(alpha / RANK)
    finetrainers = {"lora_config": json.dumps(PEFT)}
    path = write(tmp_path / "l.safetensors", dotted("transformer."), down=A, up=B, alpha=None, metadata=finetrainers)
    assert scale(path) == pytest.approx(6 / RANK)
    # A tensor speaks for its module, whatever the metadata says of all.
    path = write(tmp_path / "l.safetensors", dotted("transformer."), down=A, up=B, metadata=finetrainers)
    assert scale(path) == pytest.approx(ALPHA / RANK)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "not a JSON object"),
        ("{", "do not pair"),
        (" " * (1 << 20) + "{}", "1048578 bytes; at most 1048576"),
        ("[" * 100_000, "nest over 16 levels deep"),
        ('{"transformer.lora_alpha": "16"}', "lora_alpha is '16'; it must be a finite number"),
        ('{"transformer.lora_alpha": 1e999}', "lora_alpha is inf"),
        (f'{{"transformer.lora_alpha": {10**400}}}', "a number of 401 digits"),
        ('{"transformer.alpha_pattern": [1]}', "alpha_pattern is \\[1\\]"),
        ('{"transformer.alpha_pattern": {"(a+)+$": 1}}', "is not a module's name"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, text: str, reason: str):
    path = write(tmp_path / "l.safetensors", down=A, up=B, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"the metadata lora_adapter_metadata cannot be used: .*{reason}"):
        Lora(path, 1, TARGETS)


def test_what_is_left_out_is_counted_with_its_reason(tmp_path: Path):
    """As in LoRAs distilled from Wan2.1 I2V, whose image branch Wan2.2 does not have."""
    extra = matrices("diffusion_model.blocks.0.cross_attn.k_img") | matrices(
        "diffusion_model.blocks.0.cross_attn.v_img"
    )
    extra |= {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.zeros(32)}
    extra |= {"diffusion_model.img_emb.proj.1.diff_b": torch.zeros(32), "marker": torch.zeros(1)}
    extra |= matrices("diffusion_model.blocks.7.ffn.0") | matrices("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    extra |= {f"diffusion_model.{Q}.k.alpha": torch.tensor(1.0)}
    extra |= {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.zeros(32)}
    tensors = load_file(write(tmp_path / "l.safetensors", dotted("diffusion_model."))) | extra
    report = Lora(saved(tmp_path / "l.safetensors", tensors), 0.8, TARGETS).report()
    assert report.startswith(f"LoRA {tmp_path / 'l.safetensors'}, strength 0.8: applied 38, skipped 9: ")
    for part in (
        "4 of the image branch of Wan2.1 I2V (diffusion_model.blocks.0.cross_attn.k_img, ...)",
        "1 of a text encoder (lora_te1_text_model_encoder_layers_0_mlp_fc1)",
        "1 of modules that the model does not have (diffusion_model.blocks.7.ffn.0)",
        "1 of parameters that the model does not have (diffusion_model.blocks.0.self_attn.norm_q.diff_b)",
        "2 tensors that are no part of a LoRA (",
    ):
        assert part in report


@pytest.mark.parametrize("spelled", ["cross_attn.k_img", "cross_attn_k_img", "attn2.add_k_proj", "attn2_add_k_proj"])
def test_the_image_branch_is_known_in_every_spelling(tmp_path: Path, spelled: str):
    name = f"lora_unet_blocks_0_{spelled}" if "_attn_k" in spelled or "2_" in spelled else f"blocks.0.{spelled}"
    path = saved(tmp_path / "l.safetensors", matrices(Q) | matrices(name))
    assert Lora(path, 1, TARGETS).skipped == {"of the image branch of Wan2.1 I2V": [name]}


def test_a_t2v_lora_fits_an_i2v_model_but_for_its_patch_embedding(tmp_path: Path):
    targets = TARGETS | {"patch_embedding.weight": (32, 36, 1, 2, 2)}
    lora = Lora(write(tmp_path / "l.safetensors"), 1, targets)
    # Its low-rank part and its difference; the bias has the same size.
    assert "skipped 2: 2 of a patch embedding with other input channels (patch_embedding, ...)" in lora.report()
    assert "patch_embedding.weight" not in lora.updates and "patch_embedding.bias" in lora.updates
    assert len(lora.updates[f"{Q}.weight"]) == 1


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        ("Tucker-decomposed LoHa or LoKr", "hada_t1"),
        ("Tucker-decomposed LoHa or LoKr", "lokr_t2"),
        ("BOFT", "boft_R"),
        ("PEFT OFT", "oft_R.weight"),
        ("GLoRA", "a1.weight"),
        ("(IA)^3", "on_input"),
        ("(IA)^3", "ia3_l"),
        ("VeRA", "vera_lambda_b"),
        ("HRA", "hra_u"),
        ("Bone or MiSS", "bone_r"),
        ("Tucker-decomposed LoCon", "lora_mid.weight"),
        ("weight-replacing (set_weight)", "set_weight"),
        ("scaled LoRA without what is scaled", "lora_down.extra.weight_scale"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str, role: str):
    message = refusal(tmp_path, matrices(Q) | {f"{Q}.{role}": torch.zeros(1)})
    assert message.startswith(f"it is a {kind} file ({Q}.{role}); supported are")


SDXL_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "looks_like"),
    [
        (matrices("lora_unet_double_blocks_0_img_attn_qkv"), "Flux, Chroma or HunyuanVideo"),
        (matrices("transformer.single_transformer_blocks.0.attn.to_q"), "Flux, Chroma or HunyuanVideo"),
        (matrices(SDXL_Q, width=2048), "SDXL"),
        (matrices("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"), "Stable Diffusion 1.5 or 2"),
        (matrices("transformer_blocks.0.attn.add_k_proj"), "Qwen-Image or Stable Diffusion 3"),
        (matrices("transformer.transformer_blocks.0.attn1.to_q"), "LTX-Video or CogVideoX"),
        (matrices("diffusion_model.layers.0.attention.to_q"), "Z-Image or Lumina"),
        (matrices("diffusion_model.blocks.0.self_attn.q_proj"), "Cosmos"),
        (matrices("lora_te_text_model_encoder_layers_0_mlp_fc1"), "a text encoder"),
        (matrices("something.else"), "a model that this pack does not know"),
        (matrices("diffusion_model.vace_blocks.0.self_attn.q"), "a Wan VACE model"),
        (matrices("diffusion_model.blocks.0.cross_attn.k_img", 5120, 5120), "Wan2.1 I2V 14B"),
    ],
)
def test_a_lora_that_fits_nothing_says_what_it_looks_made_for(
    tmp_path: Path, tensors: dict[str, Tensor], looks_like: str
):
    first = next(iter(tensors)).removesuffix(".lora_down.weight")
    message = refusal(tmp_path, tensors)
    assert message.startswith("nothing in it fits this model, a Wan model of an unreleased size; ")
    assert message.endswith(f"it looks made for {looks_like} (it changes {first}, ...)")


TI2V_5B = WanConfig(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48, text_dim=4096, freq_dim=256
)  # fmt: skip


def test_wrong_sizes_name_both_models(tmp_path: Path):
    t2v = model_shapes(WAN_CONFIGS["t2v-A14B"])
    message = refusal(tmp_path, matrices(f"diffusion_model.{Q}", 3072, 3072), t2v)
    assert message == (
        f"diffusion_model.{Q} changes a parameter of 3072 x 3072; the model's is 5120 x 5120. "
        "It looks made for a Wan 5B model (TI2V-5B or Fun-InP 5B); this model is Wan2.2 T2V A14B or Wan2.1 T2V 14B"
    )
    small = refusal(tmp_path, matrices("lora_unet_blocks_0_ffn_0", 8960, 1536), model_shapes(TI2V_5B))
    assert small.endswith("It looks made for a Wan 1.3B model (T2V or I2V); this model is Wan2.2 TI2V 5B")
    norm = {"blocks.0.norm3.diff": torch.zeros(5120), "patch_embedding.diff": torch.zeros(5120, 36, 1, 2, 2)}
    message = refusal(tmp_path, norm, TARGETS)
    assert "changes a parameter of 5120; the model's is 32. It looks made for Wan2.2 I2V A14B; " in message


SOME_14B = "a Wan 14B model (T2V or I2V)"


@pytest.mark.parametrize(
    ("origin", "shapes"),
    [
        (SOME_14B, {f"{Q}.lora_down.weight": (64, 5120)}),
        (SOME_14B, {"lora_unet__blocks_0_ffn_0.lora_up.weight": (13824, 64), "lora_unet__head_head.diff": (64, 5120)}),
        ("Wan2.2 I2V A14B", {"patch_embedding.lora_down.weight": (32, 144), "patch_embedding.diff_b": (5120,)}),
        ("Wan2.2 T2V A14B or Wan2.1 T2V 14B", {"patch_embedding.diff": (5120, 16, 1, 2, 2)}),
        ("Wan2.1 I2V 14B", {f"{Q}.diff": (5120, 5120), "img_emb.proj.0.diff": (1280,)}),
        ("a Wan 1.3B model (T2V or I2V)", {"transformer.blocks.0.attn1.to_q.lora_A.weight": (16, 1536)}),
        ("Wan2.1 Fun InP 1.3B", {"patch_embedding.diff": (1536, 36, 1, 2, 2)}),
        ("a Wan 5B model (TI2V-5B or Fun-InP 5B)", {"blocks.0.diff_m": (1, 6, 3072)}),
        ("a Wan VACE model", {f"{Q}.diff": (5120, 5120), "vace_blocks.3.after_proj.diff": (5120, 5120)}),
    ],
)
def test_wan_models_are_told_apart_by_their_sizes(origin: str, shapes: dict[str, tuple[int, ...]]):
    assert describe_origin(shapes) == origin


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.weight": torch.zeros(1)}, f"it is a file of 1 tensors such as {Q}.weight; expected a LoRA"),
        ({f"{Q}.alpha": torch.zeros(1)}, "it is a file of 1 tensors"),
        ({f"{Q}{A}": torch.zeros(2, 32)}, f"{Q} has {Q}{A} but no up"),
        ({f"{Q}{B}": torch.zeros(32, 2)}, f"{Q} has {Q}{B} but no down"),
        (matrices(Q) | {f"{Q}.lora_up.weight": torch.zeros(32, 3)}, r"are not factors of a matrix"),
        (matrices(Q, rank=0), "are not factors of a matrix"),
        (matrices(Q) | {f"{Q}.lora_down.weight": torch.zeros(())}, "are not factors of a matrix"),
        (matrices(Q, alpha=torch.tensor(torch.nan)), f"{Q}.alpha is nan; it must be a finite number"),
        (matrices(Q, alpha=torch.tensor(-torch.inf)), f"{Q}.alpha is -inf; it must be a finite number"),
        (matrices(Q, alpha=torch.ones(2)), f"{Q}.alpha has shape [2]; it must be one number"),
        (matrices(Q, alpha=torch.tensor(True)), f"{Q}.alpha is BOOL; it must be one of F64, F32"),
        (matrices(Q) | matrices(f"diffusion_model.{Q}"), f"diffusion_model.{Q} both change {Q}"),
        (
            {f"{Q}.lora_A.{n}.weight": torch.zeros(2, 32) for n in "ab"},
            f"it holds two adapters: {Q}.lora_A.a.weight and",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str):
    assert message in refusal(tmp_path, tensors)


def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path):
    (tmp_path / "l.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"l\.safetensors is not a safetensors file: it is a git-lfs pointer"):
        Lora(tmp_path / "l.safetensors", 1, TARGETS)
