"""Weights that are laid otherwise on the ranks that hold them, without their files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_formats import write_scaled
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import TINY, random_weights
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.mesh import Mesh
from wan_pack.distributed.weights import resharding
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.transformer.transformer import WanModel, meta_model

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
FLOATS: dict[str, Any] = {"mixed_precision": "fp32"}
FP8_BESIDE: dict[str, Any] = {
    "mixed_precision": "bf16", "linear_precision": "fp8", "quantised_loras": "beside", "exact_blocks": "1"
}  # fmt: skip
INT8: dict[str, Any] = {"mixed_precision": "bf16", "linear_precision": "int8"}


@pytest.mark.parametrize(("world", "settings"), [(2, FLOATS), (3, FP8_BESIDE), (2, INT8)], ids=str)
def test_weights_go_from_whole_to_shards_and_back(tmp_path: Path, world: int, settings: dict[str, Any]):
    """Rows that do not divide by the ranks among them, fp8 codes with scales, codes that are made here, and LoRAs."""
    (tmp_path / "model").mkdir()
    weights, path = random_weights(CONFIG), tmp_path / "model" / "m.safetensors"
    if settings is FP8_BESIDE:
        write_scaled(path, weights, torch.float8_e4m3fn, scale="weight_scale", per_row=True)
    else:
        save_file(weights, path)
    lora = {"lora_A": torch.randn(4, 128), "lora_B": torch.randn(128, 4) * 0.1}
    save_file(
        {f"diffusion_model.blocks.0.self_attn.q.{name}.weight": value for name, value in lora.items()},
        tmp_path / "l.safetensors",
    )
    run_ranks(
        "weights_are_laid_otherwise", world, folder=str(tmp_path / "model"),
        loras=[(str(tmp_path / "l.safetensors"), 1.0)], settings=settings,
    )  # fmt: skip


@pytest.mark.parametrize(("free", "sharded", "moves"), [(99, False, False), (100, False, True), (0, True, True)])
def test_what_becomes_whole_needs_its_room_on_every_device(
    free: int, sharded: bool, moves: bool, monkeypatch: pytest.MonkeyPatch
):
    """Else it is read anew, after all that was there is gone."""

    class Moved(Exception):
        pass

    class Model:
        def parameters(self) -> list[torch.Tensor]:
            return [torch.empty(60, dtype=torch.uint8), torch.empty(40, dtype=torch.uint8)]

    def begin(model: Any) -> None:
        raise Moved

    asked: list[bool] = []
    monkeypatch.setattr(resharding, "free_bytes", lambda device, ranks: free)
    monkeypatch.setattr(resharding, "everywhere", lambda mine, group, device: (asked.append(mine), mine)[1])
    monkeypatch.setattr(resharding, "release_gathered", begin)
    mesh = Mesh(None, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(Mesh, "group", None)
    parallel = Parallel(gpu_count=2, use_fsdp=sharded)
    if moves:
        with pytest.raises(Moved):
            resharding.resharded(Model(), mesh, parallel, torch.device("cpu"))  # type: ignore[arg-type]
    else:
        assert resharding.resharded(Model(), mesh, parallel, torch.device("cpu")) is None  # type: ignore[arg-type]
    assert asked == [moves]


class Layout:
    """Of this process, in the place of one of three ranks: which rows of each weight it has, as FSDP divides them."""

    def __init__(self, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.world = rank, 3
        self.shards: dict[int, torch.Tensor] = {}
        """By id of the parameter that stands for it: what there is of it."""
        monkeypatch.setattr(resharding, "local_rows", self.local_rows)
        monkeypatch.setattr(resharding, "everywhere", lambda mine, group, device: mine)
        monkeypatch.setattr(resharding, "free_bytes", lambda device, ranks: 1 << 40)
        monkeypatch.setattr(Mesh, "group", SimpleNamespace(size=lambda: self.world))
        self.mesh = Mesh(None, None, None)  # type: ignore[arg-type]

    def rows_of(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        share = -(-len(whole) // self.world)
        return whole[rank * share : (rank + 1) * share]

    def local_rows(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
        held = self.shards.get(id(parameter))
        if held is not None:
            self.asked = id(parameter)
            return held, 0
        rows = self.rows_of(parameter.data, self.rank)
        start = min(self.rank * -(-len(parameter) // self.world), len(parameter)) * parameter[0].numel()
        return (rows, start) if self.divides else (parameter.data, 0)

    divides = False
    """What is made is divided over the ranks; else each has all."""
    asked = 0
    """The parameter whose rows were asked for last."""


def small_model() -> WanModel:
    model = meta_model(TINY, torch.float32)
    model.load_state_dict(random_weights(TINY), assign=True)
    return model.requires_grad_(False)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_all_ranks_have_together_is_the_whole_and_its_shards_are_let_go(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 32 rows 11, 11 and 10, of 80 27, 27 and 26; of a single one only the first rank has some."""
    layout, model = Layout(rank, monkeypatch), small_model()
    whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layout.shards = {id(p): layout.rows_of(p.data, rank).clone() for p in model.parameters()}
    values = {id(parameter): whole[name] for name, parameter in model.named_parameters()}
    gathered: list[tuple[int, int]] = []

    def gather(everyone: torch.Tensor, mine: torch.Tensor, *, group: Any) -> None:
        assert group is layout.mesh.group and everyone.numel() == 3 * mine.numel()
        value = values[layout.asked]
        parts = [layout.rows_of(value, one).reshape(-1).view(torch.uint8) for one in range(3)]
        parts = [torch.cat((part, part.new_zeros(mine.numel() - part.numel()))) for part in parts]
        assert torch.equal(mine, parts[rank])
        gathered.append((layout.asked, mine.numel()))
        everyone.copy_(torch.cat(parts))

    monkeypatch.setattr(resharding.dist, "all_gather_into_tensor", gather)
    parallel = Parallel(gpu_count=3, use_fsdp=False, mixed_precision="fp32")
    clock = iter([3.0, 5.5])
    monkeypatch.setattr(resharding, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with caplog.at_level("INFO"):
        found = resharding.resharded(model, layout.mesh, parallel, torch.device("cpu"))
    assert caplog.messages == ["weights that lay here are now whole on every rank, after 2.50 s"]
    assert found is not None and len(gathered) == len(whole)
    moved, weights = found
    assert all(torch.equal(parameter, whole[name]) for name, parameter in moved.named_parameters())
    assert weights.resident_bytes == sum(value.nbytes for value in whole.values())
    assert all(shard.untyped_storage().nbytes() == 0 for shard in layout.shards.values())
    # Each as much as a rank has at most.
    assert dict(gathered) == {at: 4 * -(-len(value) // 3) * value[0].numel() for at, value in values.items()}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("gather", ["block", "expert"])
def test_of_a_whole_a_rank_keeps_its_rows(rank: int, gather: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, model = Layout(rank, monkeypatch), small_model()
    whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layout.shards = {id(parameter): parameter.data for parameter in model.parameters()}
    layout.divides = True
    sharded: list[Any] = []
    monkeypatch.setattr(resharding, "shard_weights", lambda *given: sharded.append(given))
    parallel = Parallel(gpu_count=3, use_fsdp=True, gather=gather, mixed_precision="fp32")
    found = resharding.resharded(model, layout.mesh, parallel, torch.device("cpu"))
    assert found is not None
    assert sharded == [(found[0], layout.mesh, gather)] and not any(p.is_meta for p in found[0].parameters())
    for name, parameter in found[0].named_parameters():
        assert torch.equal(layout.rows_of(parameter.data, rank), layout.rows_of(whole[name], rank)), name
    assert all(value.untyped_storage().nbytes() == 0 for value in layout.shards.values())


def test_one_rank_and_streamed_blocks_have_nothing_to_be_laid_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, model, cpu = Layout(0, monkeypatch), small_model(), torch.device("cpu")
    assert resharding.resharded(model, None, Parallel(gpu_count=1), cpu) is None
    streams = Parallel(gpu_count=3, use_fsdp=False, stream_blocks=True)
    assert resharding.resharded(model, layout.mesh, streams, cpu) is None
    assert all(parameter.untyped_storage().nbytes() for parameter in model.parameters())
