"""LoRA files of every family, merged row by row, equal the whole update."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import lora_families
import pytest
import torch
from lora_families import ALPHA, FAMILIES, RANK, TARGETS, A, B, dotted, in_diffusers, merged, write
from safetensors.torch import save_file
from tiny import random_weights, write_official
from torch import Tensor
from torch.testing import assert_close
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import load_expert
from wan_pack.wan.lora import merging
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.merging import changes, merge
from wan_pack.wan.lora.module_names import ModuleNames
from wan_pack.wan.model.config import HIGH_NOISE, LOW_NOISE

Q = "blocks.0.self_attn.q.weight"


def merge_all(loras: list[Lora], ranges: int = 1) -> dict[str, Tensor]:
    """The tiny model's weights, each merged in `ranges` parts of its rows."""
    weights = random_weights()
    for name, weight in weights.items():
        first = 0
        for rows in weight.chunk(ranges):
            merge(loras, name, rows, first)
            first += rows.shape[0]
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_to_the_same_weights(tmp_path: Path, family: str):
    lora = Lora(FAMILIES[family](tmp_path / "l.safetensors"), 0.5, TARGETS)
    assert_close(merge_all([lora]), merged(0.5))
    count = len(lora_families.LOW_RANK) + len(lora_families.parts()[1])
    assert f"strength 0.5: applied {count}" in lora.report() and "skipped" not in lora.report()


def test_every_module_is_found_by_every_spelling():
    """The names are diffusers' own, of a model built by it."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, text_dim=48, freq_dim=32, ffn_dim=80, num_layers=2,
            cross_attn_norm=True,
        )  # fmt: skip
    names = ModuleNames(TARGETS)
    tables = {"scale_shift_table", *(f"blocks.{i}.scale_shift_table" for i in (0, 1))}
    modules = {name.rpartition(".")[0] for name, _ in theirs.named_parameters() if name not in tables}
    found = {module: names.find(module) for module in modules}
    assert sorted(found.values()) == sorted({n.rpartition(".")[0] for n in TARGETS if not n.endswith("modulation")})
    assert {module: names.find(module.replace(".", "_")) for module in modules} == found
    assert all(names.find(official.replace(".", "_")) == official for official in found.values())
    assert names.find("blocks.1.scale_shift_table") == "blocks.1.modulation"
    assert names.find("blocks.2.self_attn.q") is names.find("blocks_1_self_attn") is None


@pytest.mark.parametrize("ranges", [2, 3, 7])
def test_row_ranges_add_up_to_the_whole_update(tmp_path: Path, ranges: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merging, "CHUNK_BYTES", 3 * 4 * 32)
    lora = Lora(write(tmp_path / "l.safetensors"), -1.5, TARGETS)
    assert_close(merge_all([lora], ranges), merged(-1.5))


def test_several_loras_with_their_strengths_round_once(tmp_path: Path):
    """In bf16, adding one after the other would round three times."""
    loras = [
        Lora(write(tmp_path / "1.safetensors"), 0.7, TARGETS),
        Lora(write(tmp_path / "2.safetensors", dotted("diffusion_model."), seed=2), -0.4, TARGETS),
        Lora(write(tmp_path / "3.safetensors", down=A, up=B, full=False, seed=3), 0.01, TARGETS),
    ]
    base = random_weights()[Q].bfloat16()
    updates = [merged(1, seed=seed)[Q] - random_weights()[Q] for seed in (1, 2, 3)]
    rows = base.clone()
    merge(loras, Q, rows, 0)
    total = base.double() + 0.7 * updates[0].double() - 0.4 * updates[1].double() + 0.01 * updates[2].double()
    # Half a unit in the last place of bf16's 8 bits, and float32's own noise.
    assert ((rows.double() - total).abs() <= total.abs() * 2**-8 + 1e-6).all()
    twice = base.clone()
    for lora in loras:
        merge([lora], Q, twice, 0)
    assert (twice.double() - total).abs().sum() > (rows.double() - total).abs().sum()


def test_changes_says_which_parameters_a_lora_touches(tmp_path: Path):
    lora = Lora(write(tmp_path / "l.safetensors"), 1, TARGETS)
    assert changes([lora], Q) and changes([lora], "head.modulation") and changes([lora], "blocks.0.norm3.bias")
    assert not changes([lora], "blocks.0.self_attn.k.bias") and not changes([], Q)


def test_strength_zero_changes_nothing(tmp_path: Path):
    """Not even a file that is gone, or made for another model, is in the way of a LoRA that is switched off."""
    lora = Lora(tmp_path / "gone.safetensors", 0.0, TARGETS)
    assert_close(merge_all([lora]), random_weights(), rtol=0, atol=0)
    assert not changes([lora], Q)
    assert lora.report().endswith("strength 0, nothing applied")


def test_without_alpha_the_scale_is_one(tmp_path: Path):
    lora = Lora(write(tmp_path / "l.safetensors", alpha=None), 1, TARGETS)
    assert_close(merge_all([lora]), merged(1, scale=1))
    assert lora.report().endswith(f"; {len(lora_families.LOW_RANK)} without alpha, taken as the rank")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_files_are_summed_in_float32(tmp_path: Path, dtype: torch.dtype):
    """Only the file's own rounding is lost: the sum over the rank is float32's."""
    lora = Lora(write(tmp_path / "l.safetensors", dtype=dtype), 1, TARGETS)
    low_rank, differences = lora_families.parts()
    up, down = (factor.to(dtype).float() for factor in low_rank["blocks.0.self_attn.q"])
    weights = merge_all([lora])
    assert_close(weights[Q], random_weights()[Q] + ALPHA / RANK * up @ down)
    expected = random_weights()["head.modulation"] + differences["head.modulation"].to(dtype).float()
    assert_close(weights["head.modulation"], expected)


def test_a_bias_of_the_up_matrix_is_scaled_like_it(tmp_path: Path):
    module = "transformer.blocks.0.attn1.to_q"
    up, down, bias = torch.randn(32, 2), torch.randn(2, 32), torch.randn(32)
    save_file(
        {f"{module}{A}": down, f"{module}{B}": up, f"{module}.lora_B.bias": bias, f"{module}.alpha": torch.tensor(6.0)},
        tmp_path / "l.safetensors",
    )
    rows = torch.zeros(32)
    merge([Lora(tmp_path / "l.safetensors", 0.5, TARGETS)], "blocks.0.self_attn.q.bias", rows, 0)
    assert_close(rows, 1.5 * bias)


def test_convolutions_may_be_written_as_convolutions_or_matrices(tmp_path: Path):
    up, down, diff = torch.randn(32, 2), torch.randn(2, 64), torch.randn(32, 64)
    forms = (
        {"lora_down.weight": down, "lora_up.weight": up, "diff": diff},
        {"lora_down.weight": down.view(2, 16, 1, 2, 2), "lora_up.weight": up.view(32, 2, 1, 1, 1)}
        | {"diff": diff.view(32, 16, 1, 2, 2)},
    )
    for form in forms:
        save_file({f"patch_embedding.{role}": tensor for role, tensor in form.items()}, tmp_path / "l.safetensors")
        rows = torch.zeros(32, 16, 1, 2, 2)
        merge([Lora(tmp_path / "l.safetensors", 1, TARGETS)], "patch_embedding.weight", rows, 0)
        assert_close(rows.flatten(1), up @ down + diff)


def test_a_file_of_both_experts_is_split(tmp_path: Path):
    from safetensors.torch import load_file

    first = load_file(write(tmp_path / "1.safetensors", dotted("transformer.", in_diffusers), down=A, up=B))
    second = load_file(write(tmp_path / "2.safetensors", dotted("transformer_2.", in_diffusers), down=A, up=B, seed=2))
    save_file(first | second, tmp_path / "both.safetensors")
    for expert, seed in ((HIGH_NOISE, 1), (LOW_NOISE, 2)):
        lora = Lora(tmp_path / "both.safetensors", 1, TARGETS, expert=expert)
        assert_close(merge_all([lora]), merged(1, seed=seed))
        assert "of the other expert" in lora.report()
    with pytest.raises(ValueError, match=r"LoRAs of both experts .*transformer_2.*one file per expert"):
        Lora(tmp_path / "both.safetensors", 1, TARGETS)


def test_merging_reads_only_the_rows_asked_for(tmp_path: Path):
    rows, width = 4096, 256
    up, down, diff = torch.full((rows, 8), torch.nan), torch.randn(8, width), torch.full((rows, width), torch.nan)
    up[100:108], diff[100:108] = 1, 0
    path = tmp_path / "l.safetensors"
    save_file({"x.lora_up.weight": up, "x.lora_down.weight": down, "x.diff": diff}, path)
    lora = Lora(path, 1, {"x.weight": (rows, width)})
    kept = torch.zeros(8, width)
    tracemalloc.start()
    try:
        merge([lora], "x.weight", kept, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_close(kept, down.sum(0).expand(8, width))
    assert path.stat().st_size > 4 << 20 and peak < 128 << 10


def test_a_loaded_expert_has_every_kind_of_change(tmp_path: Path):
    folder = write_official(tmp_path / "model", random_weights())
    lora = write(tmp_path / "l.safetensors", dotted("diffusion_model."))
    model = load_expert(
        [str(folder / "diffusion_pytorch_model.safetensors")], [(str(lora), 0.25)],
        parallel=Parallel(gpu_count=1, mixed_precision="fp32"), mesh=None,
        shard=SequenceShard(length=8, rank=0, world=1), device=torch.device("cpu"),
    )  # fmt: skip
    assert_close(dict(model.state_dict()), merged(0.25))
