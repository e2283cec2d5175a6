"""LoRA files -> low-rank updates by official module name, merged row by row.

    W += strength * (alpha / rank) * up @ down            (Hu et al., 2021, arXiv 2106.09685)

A rank that keeps rows [a, b) of W needs rows [a, b) of `up` only: the whole product never exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .headers import read_header

PREFIXES = ("", "diffusion_model.")
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """The change of one weight matrix."""

    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[out, rank]"""
    scale: float
    """strength * alpha / rank."""

    def rows(self, first: int, count: int, device: torch.device) -> Tensor:
        """Rows [first, first + count) of the change, [count, in] float32."""
        up = self.up[first : first + count].to(device, torch.float32)
        return (up @ self.down.to(device, torch.float32)).mul_(self.scale)


class Lora:
    """One LoRA file, for the weights of `targets` (official names of matrices -> shape).

    Raises:
        ValueError: the file is damaged, or nothing in it fits the model.
    """

    def __init__(self, path: str | Path, strength: float, targets: dict[str, tuple[int, ...]]) -> None:
        self.path = str(path)
        self.updates: dict[str, LowRankUpdate] = {}
        names = read_header(path).tensors
        modules = [name.removesuffix(DOWN) for name in names if name.endswith(DOWN)]
        self.skipped: list[str] = []
        """Modules in the file that the model does not have."""
        with safe_open(path, "pt") as file:
            for module in modules:
                target = _target(module, targets)
                if target is None:
                    self.skipped.append(module)
                    continue
                if module + UP not in names:
                    raise ValueError(f"{path}: {module} has {DOWN} but no {UP}")
                down, up = file.get_tensor(module + DOWN), file.get_tensor(module + UP)
                if down.ndim != 2 or (up.shape[0], down.shape[1]) != targets[target] or up.shape[1] != down.shape[0]:
                    raise ValueError(
                        f"{path}: {module} changes a matrix of {up.shape[0]} x {down.shape[-1]}; "
                        f"the model's is {' x '.join(map(str, targets[target]))}. It looks made for another model"
                    )
                rank = down.shape[0]
                alpha = file.get_tensor(module + ALPHA).item() if module + ALPHA in names else rank
                self.updates[target] = LowRankUpdate(down, up, strength * alpha / rank)
        if not self.updates:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(f"{path} holds no LoRA for this model: none of its tensors (such as {first}) fits")

    def report(self) -> str:
        """One line for the log."""
        skipped = f", skipped {len(self.skipped)} unknown ({self.skipped[0]}, ...)" if self.skipped else ""
        return f"LoRA {self.path}: applied {len(self.updates)} matrices{skipped}"


def merge(loras: Iterable[Lora], name: str, rows: Tensor, first_row: int) -> None:
    """Adds what `loras` change in rows [first_row, ...) of weight `name`. Summed in float32, rounded once."""
    updates = [lora.updates[name] for lora in loras if name in lora.updates]
    if not updates:
        return
    total = rows.float()
    for update in updates:
        total += update.rows(first_row, rows.shape[0], rows.device)
    rows.copy_(total)


def _target(module: str, targets: dict[str, tuple[int, ...]]) -> str | None:
    for prefix in PREFIXES:
        name = module.removeprefix(prefix) + ".weight"
        if module.startswith(prefix) and name in targets:
            return name
    return None
