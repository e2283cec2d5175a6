"""Each weight is read by one of the ranks that hold it whole, and all have what one process would have read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoint_formats import write_scaled
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import random_weights
from torch import nn
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.shared_reading import SharedReading
from wan_pack.wan.checkpoint.weights import owners
from wan_pack.wan.model.config import WanConfig

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
TOUCHED = "blocks.0.self_attn.q"


@pytest.mark.parametrize(("world", "quantised_loras"), [(2, "merged"), (3, "merged"), (2, "beside")])
def test_ranks_share_the_reading(tmp_path: Path, world: int, quantised_loras: str):
    """Of an fp8 file with a scale for each row, and a LoRA that makes one of its weights anew, or stays beside it."""
    (tmp_path / "model").mkdir()
    write_scaled(
        tmp_path / "model" / "m.safetensors", random_weights(CONFIG), torch.float8_e4m3fn, scale="weight_scale",
        per_row=True,
    )  # fmt: skip
    lora = {"lora_A": torch.randn(4, 128), "lora_B": torch.randn(128, 4) * 0.1}
    save_file(
        {f"diffusion_model.{TOUCHED}.{name}.weight": value for name, value in lora.items()}, tmp_path / "l.safetensors"
    )
    loras = [(str(tmp_path / "l.safetensors"), 1.0)]
    results = run_ranks(
        "reading_is_shared", world, folder=str(tmp_path / "model"), loras=loras, quantised_loras=quantised_loras
    )
    read = [set(result["whole"]) for result in results]
    assert all(read), "each reads something"
    assert max(Counter(name for names in read for name in names).values()) == 1, "and nothing is read twice"
    # Of a change only what it touches, by one of them.
    changed = [set(result["changed"]) for result in results]
    weight = {f"{TOUCHED}.weight", f"{TOUCHED}.weight_scale"} if quantised_loras == "merged" else set()
    assert sorted(changed, key=len) == [*[set()] * (world - 1), weight]


def test_owners_have_equal_shares_and_keep_a_scale_with_its_weight():
    model = nn.Module()
    for i, size in enumerate((8, 1, 1, 3, 2, 1)):
        model.register_parameter(f"p{i}", nn.Parameter(torch.zeros(size)))
        model.register_parameter(f"p{i}_scale", nn.Parameter(torch.zeros(1)))
    owner = owners(model, None, 2)
    assert list(owner) == [name for name, _ in model.named_parameters()]
    assert all(owner[f"p{i}_scale"] == owner[f"p{i}"] for i in range(6))
    assert [owner[f"p{i}"] for i in range(6)] == [0, 1, 1, 1, 1, 1]
    assert owners(model, ["p3", "p4"], 2) == {"p3": 0, "p4": 1}
    assert set(owners(model, None, 1).values()) == {0}


@pytest.mark.parametrize(
    "apart", [{"use_fsdp": True}, {"stream_blocks": True, "use_fsdp": False}, {"hosts": ("a", "b")}]
)
def test_ranks_that_hold_other_things_read_for_themselves(apart: dict):
    class Line:
        group = object()

    whole = Parallel(gpu_count=2)
    assert SharedReading.of(whole, Line(), torch.device("cpu")).group is Line.group
    assert SharedReading.of(Parallel(gpu_count=2, **apart), Line(), torch.device("cpu")).group is None
    assert SharedReading.of(Parallel(gpu_count=1), None, torch.device("cpu")).group is None


@pytest.mark.parametrize(("reach", "disabled", "shared"), [(True, "0", True), (False, "0", False), (True, "1", False)])
def test_only_gpus_that_reach_each_other_share(
    reach: bool, disabled: str, shared: bool, monkeypatch: pytest.MonkeyPatch
):
    class Line:
        group = object()

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reach)
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    found = SharedReading.of(Parallel(gpu_count=2, gpu_ids=("0", "1")), Line(), torch.device("cuda", 0))
    assert (found.group is not None) == shared
