"""LoRAs that stay beside a weight: the factors of all of its products as two matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .lora import Lora
from .updates import LowRank, read_matrix

LORA_FACTORS = ("lora_down", "lora_up")
"""Parameters of `wan.model.linear.Linear`."""


def products(loras: Iterable[Lora], name: str) -> list[LowRank]:
    """Of the changes of parameter `name` those that are products of two matrices."""
    return [update for lora in loras for update in lora.updates.get(name, ()) if isinstance(update, LowRank)]


def lora_rank(loras: Iterable[Lora], name: str) -> int:
    """Of all products together."""
    return sum(update.down.shape[0] for update in products(loras, name))


def read_factor(loras: Iterable[Lora], name: str, factor: str, rows: Tensor, first: int) -> None:
    """Reads rows [first, ...) of `lora_down` [rank, in] or `lora_up` [out, rank] of weight `name`, one file after the
    other; strengths and alphas are in the latter. What their ranks leave of the rows' is zeros.

    Raises:
        OSError: a file cannot be read any more, or ended early.
    """
    updates, count = products(loras, name), rows.shape[0]
    rows.zero_()
    if factor == "lora_down":
        whole = torch.cat([torch.empty(0, rows.shape[1]), *(read_matrix(update.down) for update in updates)])
        part = whole[first : first + count]
        rows[: part.shape[0]].copy_(part)
    else:
        parts = (read_matrix(update.up, first, count) * update.scale for update in updates)
        part = torch.cat([torch.empty(count, 0), *parts], dim=1)
        rows[:, : part.shape[1]].copy_(part)
