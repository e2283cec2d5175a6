"""Weights that are laid otherwise on the ranks that hold them, without their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import write_scaled
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import random_weights
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.mesh import Mesh
from wan_pack.distributed.weights import resharding
from wan_pack.wan.model.config import WanConfig

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
