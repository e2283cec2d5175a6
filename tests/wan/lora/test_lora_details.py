"""LoRAs part by part: pieces in which they are merged, settings, what they look made for, what of them does not fit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lora_families import TARGETS
from safetensors.torch import save_file
from torch import Tensor
from wan_pack.wan.lora import alpha, merging
from wan_pack.wan.lora.alpha import NO_CONFIG, read_adapter_config
from wan_pack.wan.lora.beside import lora_rank, products, read_factor
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.merging import merge
from wan_pack.wan.lora.module_names import ModuleNames
from wan_pack.wan.lora.origin import describe_origin
from wan_pack.wan.lora.updates import Adder, LowRank, ReadRows

Q = "blocks.0.self_attn.q"


def opened(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Lora:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "l.safetensors")
    return Lora(folder / "l.safetensors", options.pop("strength", 1.0), TARGETS, **options)


def factors(module: str, rank: int = 2, out: int = 32, width: int = 32) -> dict[str, Tensor]:
    return {f"{module}.lora_down.weight": torch.ones(rank, width), f"{module}.lora_up.weight": torch.ones(out, rank)}


@dataclass
class Recorded:
    """A change of nothing that notes which rows it is asked for."""

    needs_base: ClassVar[bool] = False
    asked: list[tuple[int, int]] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    pieces: list[tuple[int, int]] = field(default_factory=list)

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        self.asked.append((first, count))
        self.read += read_rows(first + 2, 3).view(3, -1)[:, 0].tolist() if count > 4 else []

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            assert rows.dtype == torch.float32 and rows.shape[1:] == (8,)
            self.pieces.append((start, len(rows)))

        return add


@pytest.mark.parametrize(
    ("nbytes", "pieces"),
    [
        (4 * 8 * 4, [(0, 4), (4, 4), (8, 2)]),
        (4 * 8 * 4 - 1, [(0, 3), (3, 3), (6, 3), (9, 1)]),
        (4 * 8 * 100, [(0, 10)]),
        (1, [(row, 1) for row in range(10)]),
    ],
)
def test_so_many_bytes_of_rows_are_summed_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, pieces: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(merging, "CHUNK_BYTES", nbytes)
    lora, update = Lora(tmp_path / "none", 0, {}), Recorded()
    lora.updates["x"] = [update]
    merge([lora], "x", torch.zeros(10, 2, 4, dtype=torch.float16), 30)
    assert (update.asked, update.pieces) == ([(30, 10)], pieces)
    # What it sees of the others, before they are changed, are those that it asks for.
    numbers = torch.arange(10.0)[:, None, None].expand(10, 2, 4).contiguous()
    merge([lora], "x", numbers, 30)
    assert update.read == [0.0] * 3 + [2.0, 3.0, 4.0]
    update.asked.clear()
    merge([lora], "x", torch.zeros(0, 2, 4), 30)
    assert not update.asked, "no rows, nothing to read"


def test_a_row_of_zeros_stays_one_under_dora(tmp_path: Path) -> None:
    """It has no direction, whatever its length is to be."""
    down, up = torch.ones(1, 32), torch.ones(32, 1)
    up[3] = 0
    tensors = {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up, f"{Q}.dora_scale": torch.full((32, 1), 5.0)}
    rows = torch.zeros(32, 32)
    merge([opened(tmp_path, tensors)], f"{Q}.weight", rows, 0)
    assert rows[3].tolist() == [0.0] * 32
    torch.testing.assert_close(rows[4].norm(), torch.tensor(5.0))


def test_factors_beside_a_weight_are_those_of_all_files(tmp_path: Path) -> None:
    """Of any rows, and zeros behind them."""
    loras, ups, downs = [], [], []
    for number, rank in enumerate((2, 3)):
        down, up = torch.randn(rank, 32), torch.randn(32, rank)
        save_file({f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up, f"{Q}.diff": torch.ones(32, 32)},
                  tmp_path / f"{number}.safetensors")  # fmt: skip
        loras.append(Lora(tmp_path / f"{number}.safetensors", number + 0.5, TARGETS))
        downs.append(down)
        ups.append((number + 0.5) * up)
    name = f"{Q}.weight"
    assert len(products(loras, name)) == 2 and lora_rank(loras, name) == 5 and lora_rank(loras, "other") == 0
    down, up = torch.cat([*downs, torch.zeros(2, 32)]), torch.cat([*ups, torch.zeros(32, 2)], dim=1)
    for first, count in ((0, 7), (1, 3), (4, 3), (6, 1)):
        rows = torch.full((count, 32), 9.0)
        read_factor(loras, name, "lora_down", rows, first)
        torch.testing.assert_close(rows, down[first : first + count])
    for first, count in ((0, 32), (30, 2)):
        rows = torch.full((count, 7), 9.0)
        read_factor(loras, name, "lora_up", rows, first)
        torch.testing.assert_close(rows, up[first : first + count])


ORIGINS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "by the size that most have": (
        "a Wan 14B model (T2V or I2V)",
        {f"{Q}.a": (5120, 5120), f"{Q}.b": (1536, 8)},
    ),
    "whichever comes first": ("a Wan 14B model (T2V or I2V)", {f"{Q}.a": (1536, 8), f"{Q}.b": (5120, 5120)}),
    "past the factor that tells nothing": (
        "Wan2.2 I2V A14B",
        {"patch_embedding.lora_up.weight": (5120, 64), "patch_embedding.lora_down.weight": (64, 144)},
    ),
    "past the other spelling": (
        "Wan2.2 I2V A14B",
        {"patch_embedding.lora_B.weight": (5120, 64), "patch_embedding.lora_A.weight": (64, 144)},
    ),
    "past what is no patch": (
        "Wan2.2 I2V A14B",
        {f"{Q}.lora_A.weight": (64, 5120), "patch_embedding.lora_A.weight": (64, 144)},
    ),
    "of no whole patches": ("a Wan 14B model (T2V or I2V)", {"patch_embedding.lora_A.weight": (5120, 145)}),
    "of no size": ("a Wan model of an unreleased size", {f"{Q}.diff": (33, 33)}),
    "SDXL by its second text encoder": (
        "SDXL",
        {"lora_unet_down_blocks_0.a": (8, 320), "lora_te2_text.a": (8, 8)},
    ),
    "SDXL by its text": ("SDXL", {"lora_unet_mid_block.b": (8, 8), "lora_unet_down_blocks_0.a": (8, 2048)}),
    "the first version": ("Stable Diffusion 1.5 or 2", {"unet.up_blocks.0.a": (8, 768), "lora_te_text.a": (8, 8)}),
    "the third": ("Stable Diffusion 3", {"joint_blocks.3.a": (8, 8), "x": (8, 8)}),
    "a language model": ("a language model", {"model.layers.1.mlp.gate_proj.a": (8, 8), "x": (8, 8)}),
    "image and control": ("a Wan VACE model", {f"{Q}.a": (5120, 8), "vace_blocks.0.before_proj.a": (8, 8)}),
    "image": ("Wan2.1 I2V 14B", {f"{Q}.a": (5120, 8), "blocks.0.cross_attn.k_img.a": (8, 5120)}),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_a_lora_looks_made_for_a_model(case: str) -> None:
    origin, shapes = ORIGINS[case]
    assert describe_origin(shapes) == origin


def config(folder: Path, settings: object, name: str = "adapter_model.safetensors", **metadata: object) -> Any:
    text = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return read_adapter_config(folder / name, {key: json.dumps(value) for key, value in metadata.items()}, second=False)


def test_settings_are_read_where_they_are_a_files_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"lora_alpha": 3, "r": 4}
    assert config(tmp_path, mine).alpha == 3
    assert config(tmp_path, mine, "other.safetensors") is NO_CONFIG
    assert config(tmp_path, mine, lora_config={"lora_alpha": 5}).source == "the metadata lora_config"
    both = config(tmp_path, mine, lora_config={"lora_alpha": 5}, lora_adapter_metadata={"transformer.lora_alpha": 6})
    assert (both.source, both.alpha) == ("the metadata lora_adapter_metadata", 6)
    monkeypatch.setattr(alpha, "MAX_CONFIG_BYTES", 20)
    assert config(tmp_path, b'{"lora_alpha": 12.5}').alpha == 12.5
    with pytest.raises(ValueError, match=r"adapter_config\.json is longer than 20 bytes"):
        config(tmp_path, b'{"lora_alpha": 12.5} ')
    with pytest.raises(ValueError, match=r"the metadata lora_config cannot be used: it has 21 bytes; at most 20"):
        config(tmp_path, {}, lora_config={"lora_alpha": 12.55})
    (tmp_path / "adapter_config.json").unlink()
    assert read_adapter_config(tmp_path / "adapter_model.safetensors", {}, second=False) is NO_CONFIG


@pytest.mark.parametrize(
    ("settings", "alpha", "rank", "stabilised"),
    [
        ({"lora_alpha": 3, "alpha": 4, "r": 8}, 3, 8, False),
        ({"alpha": 4, "r": 1, "use_rslora": True}, 4, 1, True),
        ({"r": 0, "use_rslora": "yes"}, None, None, False),
        ({"r": True}, None, None, False),
        ({"r": 8.0, "rank_pattern": {}}, None, None, False),
        ({"r": 8, "rank_pattern": {}, "alpha_pattern": None}, None, 8, False),
        ({"r": 8, "rank_pattern": {"q": 4}}, None, None, False),
    ],
)
def test_settings_say_how_strong_a_lora_is(
    tmp_path: Path, settings: dict[str, object], alpha: float | None, rank: int | None, stabilised: bool
) -> None:
    found = config(tmp_path, settings)
    assert (found.alpha, found.rank, found.rank_stabilised) == (alpha, rank, stabilised)
    assert found.module_alpha("blocks.0.self_attn.q") == alpha


def test_the_first_pattern_that_ends_a_name_counts(tmp_path: Path) -> None:
    found = config(
        tmp_path, {"lora_alpha": 1, "alpha_pattern": {"k": 2, "^self_attn.q$": 3, "q": 4, "blocks.0.self_attn.v": 5}}
    )
    names = (
        "blocks.0.self_attn.k",
        "blocks.0.self_attn.q",
        "blocks.0.cross_attn.q",
        "blocks.0.self_attn.v",
        "blocks.1.self_attn.v",
        "k",
    )
    assert [found.module_alpha(name) for name in names] == [2, 3, 4, 5, 1, 2]
    with pytest.raises(ValueError, match="alpha_pattern q is True; it must be a finite number"):
        config(tmp_path, {"alpha_pattern": {"q": True}})
    with pytest.raises(ValueError, match="lora_alpha is 'xxx") as caught:
        config(tmp_path, {"lora_alpha": "x" * 500})
    assert len(str(caught.value).partition("used: ")[2]) == 200


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("patch_embedding.diff", (32, 64)),
        ("patch_embedding.diff", (32, 16, 2, 2)),
        ("blocks.0.norm3.diff", (1, 32)),
        ("blocks.0.modulation.diff", (6, 32)),
        ("blocks.0.diff_m", (1, 6, 32)),
    ],
)
def test_a_difference_may_be_written_with_fewer_sizes(tmp_path: Path, target: str, shape: tuple[int, ...]) -> None:
    assert opened(tmp_path, {target: torch.ones(shape)}).applied == 1


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("blocks.0.ffn.0.diff", (32, 80)), ("blocks.0.norm3.diff", (33,)), ("blocks.0.diff_m", (32, 6)),
        (f"{Q}.diff_b", (2, 16)),
    ],
)  # fmt: skip
def test_a_difference_of_other_sizes_is_refused(tmp_path: Path, target: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"changes a parameter of {' x '.join(map(str, shape))}; the model's is"):
        opened(tmp_path, {target: torch.ones(shape)})


def test_both_changes_of_one_module_are_named(tmp_path: Path) -> None:
    """In two spellings; a weight and its bias may come from two."""
    tensors = factors(Q) | factors("lora_unet_blocks_0_self_attn_q")
    with pytest.raises(ValueError, match=rf"{Q} and lora_unet_blocks_0_self_attn_q both change {Q}"):
        opened(tmp_path, tensors)
    lora = opened(tmp_path, factors(Q) | {f"diffusion_model.{Q}.diff_b": torch.ones(32)})
    assert lora.updates.keys() == {f"{Q}.weight", f"{Q}.bias"}
    with pytest.raises(ValueError, match=r"it holds two adapters: .*lora_A\.a\.weight and .*lora_A\.b\.weight"):
        opened(tmp_path, {f"{Q}.lora_A.{name}.weight": torch.ones(2, 32) for name in "ab"})


def test_a_report_counts_and_gives_an_example(tmp_path: Path) -> None:
    tensors = (
        factors(Q) | {f"{Q}.alpha": torch.tensor(2.0)} | factors("blocks.5.ffn.0") | factors("vace_blocks.0.ffn.0")
    )
    lora = opened(tmp_path, tensors | factors("blocks.6.ffn.0"), strength=-0.25)
    assert lora.report() == (
        f"LoRA {tmp_path / 'l.safetensors'}, strength -0.25: applied 1, skipped 3: "
        "2 of modules that the model does not have (blocks.5.ffn.0, ...), 1 of VACE's own blocks (vace_blocks.0.ffn.0)"
    )
    (update,) = lora.updates[f"{Q}.weight"]
    assert isinstance(update, LowRank) and update.scale == -0.25


UNDERSCORED = {
    "condition_embedder_image_embedder_norm1": "img_emb.proj.0",
    "condition_embedder_image_embedder_ff_net_0_proj": "img_emb.proj.1",
    "condition_embedder_image_embedder_ff_net_2": "img_emb.proj.3",
    "condition_embedder_image_embedder_norm2": "img_emb.proj.4",
    "condition_embedder_text_embedder_linear_2": "text_embedding.2",
    "condition_embedder_time_embedder_linear_1": "time_embedding.0",
    "condition_embedder_time_proj": "time_projection.1",
    "blocks_1_attn2_add_k_proj": "blocks.1.cross_attn.k_img",
    "blocks_1_attn2_add_v_proj": "blocks.1.cross_attn.v_img",
    "blocks_1_attn2_norm_added_k": "blocks.1.cross_attn.norm_k_img",
    "blocks_1_attn1_norm_k": "blocks.1.self_attn.norm_k",
    "blocks_0_norm2": "blocks.0.norm3",
    "vace_blocks_1_attn1_to_out_0": "vace_blocks.1.self_attn.o",
    "vace_blocks_0_proj_in": "vace_blocks.0.before_proj",
    "vace_blocks_1_proj_out": "vace_blocks.1.after_proj",
    "vace_blocks_1_ffn_net_0_proj": "vace_blocks.1.ffn.0",
}


def test_underscored_names_of_every_branch_are_found() -> None:
    names = ModuleNames([f"{official}.weight" for official in UNDERSCORED.values()])
    assert {spelled: names.find(spelled) for spelled in UNDERSCORED} == UNDERSCORED
    assert all(names.find(official.replace(".", "_")) == official for official in UNDERSCORED.values())
    assert names.find("blocks_2_attn1_to_q") is None


def test_a_change_of_a_bias_is_no_change_of_a_parameter_without_one(tmp_path: Path) -> None:
    """A modulation is a parameter itself, and has the bias's size."""
    name = "blocks.0.modulation.diff_b"
    lora = opened(tmp_path, {name: torch.ones(1, 6, 32), f"{Q}.diff": torch.ones(32, 32)})
    assert lora.updates.keys() == {f"{Q}.weight"}
    assert lora.skipped == {"of parameters that the model does not have": [name]}
