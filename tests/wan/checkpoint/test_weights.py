"""Which rows of a parameter a rank reads, and that the ranks' rows make the whole; without ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_formats import write_gguf, write_plain_fp8, write_scaled
from patience import COMES_UP
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor, nn
from wan_pack.wan.checkpoint import weights
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.checkpoint.weights import empty_model, local_rows, read_weights
from wan_pack.wan.files.stored_model import open_model
from wan_pack.wan.files.stored_tensor import Joined
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.model.config import WanConfig

CONFIG = WanConfig(dim=128, ffn_dim=80, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
CPU = torch.device("cpu")
CHANGED = ("blocks.0.self_attn.q.weight", "blocks.1.ffn.0.weight")


class Shard:
    """What a rank keeps of a parameter under FSDP: rows, as many on every rank, fewer or none on the last ones."""

    def __init__(self, whole: Tensor, rank: int, world: int) -> None:
        self.shape, self.dtype, self.nbytes = whole.shape, whole.dtype, whole.nbytes
        self.placements = (SimpleNamespace(is_shard=lambda dimension: dimension == 0),)
        self.device_mesh = SimpleNamespace(size=lambda: world, get_local_rank=lambda: rank)
        count = -(-whole.shape[0] // world)
        self.rows = torch.full_like(whole[rank * count : (rank + 1) * count], 7)

    def numel(self) -> int:
        return self.shape.numel()

    def to_local(self) -> Tensor:
        return self.rows


class Model:
    """Layers, with other parameters."""

    def __init__(self, layers: nn.Module, parameters: dict[str, Any]) -> None:
        self.parameters, self.named_modules = parameters, layers.named_modules

    def named_parameters(self) -> Any:
        return self.parameters.items()


def write(path: Path, kind: str) -> Path:
    tensors = random_weights(CONFIG)
    # Rows that differ by far more than rounding does.
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = tensor * torch.linspace(1, 5, tensor.shape[0])[:, None]
    if kind == "bf16":
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    elif kind == "gguf":
        write_gguf(path, tensors, "Q8_0")
    elif kind == "fp8":
        write_plain_fp8(path, tensors, torch.float8_e4m3fn)
    else:
        dtype = torch.int8 if "int8" in kind else torch.float8_e4m3fn
        write_scaled(path, tensors, dtype, scale="weight_scale", per_row="row" in kind)
    return path


def write_lora(path: Path) -> Path:
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name in CHANGED:
        out, width = {name: tuple(tensor.shape) for name, tensor in random_weights(CONFIG).items()}[name]
        module = f"diffusion_model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, width, generator=generator)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8 by tensor", "fp8 by row", "int8 by row", "gguf"])
def test_the_rows_of_all_ranks_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, world: int, lora: bool
):
    checkpoint = Checkpoint([write(tmp_path / f"m.{'gguf' if kind == 'gguf' else 'safetensors'}", kind)])
    loras = [Lora(write_lora(tmp_path / "l.safetensors"), 0.5, checkpoint.shapes)] if lora else []
    whole = empty_model(checkpoint, torch.bfloat16, loras).to_empty(device=CPU)
    read_weights(whole, checkpoint, device=CPU, loras=loras)
    expected = dict(whole.named_parameters())
    # Merged a few rows at a time on the ranks, all at once in the whole.
    monkeypatch.setattr(weights, "MERGED_ELEMENTS", 5 * 128)
    for rank in range(world):
        shards = {name: Shard(parameter, rank, world) for name, parameter in expected.items()}
        read_weights(Model(whole, shards), checkpoint, device=CPU, loras=loras)
        for name, shard in shards.items():
            count = -(-shard.shape[0] // world)
            there = expected[name][rank * count : (rank + 1) * count]
            if name.removesuffix("_scale") in CHANGED and lora:
                # A product over other rows is rounded otherwise; a code may be the next one.
                error = (shard.rows.float() - there.float()).norm()
                assert error <= 0.01 * there.float().norm(), name
            else:
                assert torch.equal(shard.rows.float(), there.float()), name


def test_a_rank_may_have_no_row_of_a_loras_factor(tmp_path: Path):
    """Beside its weight: of rank 2, over seven ranks."""
    checkpoint, world = Checkpoint([write(tmp_path / "m.safetensors", "fp8 by row")]), 7
    loras = [Lora(write_lora(tmp_path / "l.safetensors"), 0.5, checkpoint.shapes)]
    whole = empty_model(checkpoint, torch.bfloat16, loras, Keeping(quantised_loras="beside")).to_empty(device=CPU)
    read_weights(whole, checkpoint, device=CPU, loras=loras)
    expected = dict(whole.named_parameters())
    assert any(parameter.shape[0] == 2 for name, parameter in expected.items() if "lora" in name)
    for rank in range(world):
        shards = {name: Shard(parameter, rank, world) for name, parameter in expected.items()}
        read_weights(Model(whole, shards), checkpoint, device=CPU, loras=loras)
        for name, shard in shards.items():
            count = -(-shard.shape[0] // world)
            assert torch.equal(shard.rows.float(), expected[name][rank * count : (rank + 1) * count].float()), name


def test_a_ranks_part_begins_where_the_one_before_ends():
    for rows in (1, 2, 7, 8):
        begin = 0
        for rank in range(4):
            part, row = local_rows(Shard(torch.zeros(rows, 3), rank, 4))
            assert row == begin
            begin += part.shape[0]
        assert begin == rows
    whole = torch.zeros(4, 2)
    assert local_rows(whole)[1] == 0 and local_rows(whole)[0].data_ptr() == whole.data_ptr()


def test_reading_tells_how_far_it_is_and_stops_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = Checkpoint([write(tmp_path / "m.safetensors", "bf16")])
    model = empty_model(checkpoint, torch.bfloat16).to_empty(device=CPU)
    told: list[tuple[int, int]] = []
    read_weights(model, checkpoint, ["head.head.bias", CHANGED[0]], device=CPU, on_tensor=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]

    first, stopped = iter([True]), threading.Event()

    def stop(done: int, total: int) -> None:
        stopped.set()
        raise KeyboardInterrupt

    def slowly(*arguments: Any, **options: Any) -> None:
        if not next(first, False):
            stopped.wait(COMES_UP)
            time.sleep(0.3)
        read_into(*arguments, **options)

    read_into = checkpoint.read_into
    monkeypatch.setattr(Checkpoint, "read_into", lambda self, *arguments, **options: slowly(*arguments, **options))
    names = [name for name, _ in model.named_parameters()]
    for parameter in model.parameters():
        parameter.data.fill_(7)
    with pytest.raises(KeyboardInterrupt):
        read_weights(model, checkpoint, names, device=CPU, on_tensor=stop)
    assert (dict(model.named_parameters())[names[-1]] == 7).all()


@pytest.mark.parametrize("order", [("keys", "values"), ("values", "keys")])
def test_tensors_that_are_read_as_one_lose_nothing_of_either(tmp_path: Path, order: tuple[str, str]):
    """Of two dtypes they are of one that holds both; any range of them may begin and end in either."""
    parts = {
        "keys": torch.tensor([[1.0, 3e38]], dtype=torch.bfloat16),
        "values": torch.tensor([[5.0, 1 + 2.0**-10]], dtype=torch.float16),
    }
    save_file(parts, tmp_path / "x.safetensors")
    stored = open_model([tmp_path / "x.safetensors"], "a model").weights({name: name for name in parts})
    assert Joined((stored["keys"], stored["keys"]), (2, 2)).dtype == torch.bfloat16
    one = Joined(tuple(stored[name] for name in order), (2, 2))
    whole = torch.cat([parts[name].double().flatten() for name in order])
    for start in range(4):
        for count in range(5 - start):
            out = torch.full((count,), -1.0, dtype=one.dtype)
            one.read_into(out, start=start, staging=torch.empty(64, dtype=torch.uint8))
            assert torch.equal(out.double(), whole[start : start + count]), (start, count)
