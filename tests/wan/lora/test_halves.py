"""LoRAs in diffusers' names of a face's keys and values, which are halves of one layer here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_ANIMATE, random_weights
from torch import Tensor
from torch.testing import assert_close
from wan_pack.wan.lora import merging
from wan_pack.wan.lora.beside import lora_rank, read_factor
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.merging import merge

WEIGHTS = random_weights(TINY_ANIMATE)
TARGETS = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
LAYER = "face_adapter.fuser_blocks.1.linear1_kv"
ALONE = "blocks.0.self_attn.q"
"""A layer of a half's size."""
ROWS = TARGETS[f"{ALONE}.weight"][0]
assert TARGETS[f"{LAYER}.weight"] == (2 * ROWS, ROWS)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) / 4


PAIR = {"lora_B.weight": rand(ROWS, 3), "lora_A.weight": rand(3, ROWS)}
CASES: dict[str, dict[str, Tensor]] = {
    "LoRA": PAIR | {"alpha": torch.tensor(2.0)},
    "with a bias": PAIR | {"lora_B.bias": rand(ROWS)},
    "DoRA": PAIR | {"lora_magnitude_vector": rand(ROWS).abs() + 1},
    "LoHa": {f"hada_w{i}_{side}": rand(*shape, seed=i) for i in (1, 2) for side, shape in
             (("a", (ROWS, 3)), ("b", (3, ROWS)))},
    "LoKr": {"lokr_w1": rand(4, 4), "lokr_w2": rand(ROWS // 4, ROWS // 4)},
    "OFT": {"oft_blocks": rand(ROWS // 8, 8, 8), "alpha": torch.tensor(0.0)},
    "differences": {"diff": rand(ROWS, ROWS), "diff_b": rand(ROWS)},
}  # fmt: skip


def opened(path: Path, changes: Mapping[str, dict[str, Tensor]]) -> Lora:
    """changes: module -> its tensors."""
    save_file({f"{module}.{role}": tensor for module, of in changes.items() for role, tensor in of.items()}, path)
    return Lora(path, 0.5, TARGETS)


@pytest.mark.parametrize("pieces", [1, 3, 7])
@pytest.mark.parametrize("case", CASES)
def test_a_half_changes_as_a_layer_of_its_own(
    tmp_path: Path, case: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other half stays as it is, however many rows are read and summed at a time, behind another LoRA too."""
    monkeypatch.setattr(merging, "CHUNK_BYTES", 4 * ROWS * 5)
    alone = opened(tmp_path / "alone.safetensors", {ALONE: CASES[case]})
    for module, rows in (("to_k", slice(0, ROWS)), ("to_v", slice(ROWS, None))):
        spelled = f"transformer.face_adapter.1.{module}"
        lora = opened(tmp_path / "half.safetensors", {spelled: CASES[case]})
        other = {name: opened(tmp_path / f"{name}.safetensors", {name: PAIR}) for name in (ALONE, spelled)}
        assert lora.applied == alone.applied and not lora.skipped
        assert {name.removeprefix(ALONE) for name in alone.updates} == {
            name.removeprefix(LAYER) for name in lora.updates
        }
        for name in lora.updates:
            before = WEIGHTS[name].clone()
            expected = before.clone()
            merge([other[ALONE], alone], name.replace(LAYER, ALONE), half := expected[rows].clone(), 0)
            expected[rows] = half
            found, first = before.clone(), 0
            for part in found.chunk(pieces):
                merge([other[spelled], lora], name, part, first, lambda one, many, of=before: of[one:][:many].clone())
                first += len(part)
            assert (expected - before).abs().max() > 0.01
            assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", ["to_q", "to_k", "to_v", "to_out"])
def test_a_face_is_found_with_underscores_for_dots(tmp_path: Path, module: str) -> None:
    found = [
        opened(tmp_path / f"{prefix}.safetensors", {f"{prefix}{module}": PAIR})
        for prefix in ("transformer.face_adapter.1.", "lora_unet_face_adapter_1_")
    ]
    assert found[0].updates and found[0].updates.keys() == found[1].updates.keys() and not found[1].skipped


def test_both_halves_stay_beside_a_weight(tmp_path: Path) -> None:
    values = {"lora_B.weight": rand(ROWS, 2, seed=1), "lora_A.weight": rand(2, ROWS, seed=1)}
    lora = opened(tmp_path / "l.safetensors", {"face_adapter.1.to_k": PAIR, "face_adapter.1.to_v": values})
    name = f"{LAYER}.weight"
    assert lora_rank([lora], name) == 5 and lora.applied == 2
    down, up = torch.empty(5, ROWS), torch.empty(2 * ROWS, 5)
    read_factor([lora], name, "lora_down", down, 0)
    for first in range(0, 2 * ROWS, 10):
        read_factor([lora], name, "lora_up", up[first : first + 10], first)
    expected = [0.5 * of["lora_B.weight"] @ of["lora_A.weight"] for of in (PAIR, values)]
    assert_close(up @ down, torch.cat(expected))


def test_a_half_of_another_size_is_refused(tmp_path: Path) -> None:
    wide = {"lora_B.weight": rand(2 * ROWS, 3), "lora_A.weight": rand(3, ROWS)}
    with pytest.raises(ValueError, match=r"to_k changes a parameter of 64 x 32; the model's is 32 x 32"):
        opened(tmp_path / "l.safetensors", {"face_adapter.1.to_k": wide})
    with pytest.raises(ValueError, match="nothing in it fits this model"):
        opened(tmp_path / "l.safetensors", {"face_adapter.2.to_k": PAIR})
