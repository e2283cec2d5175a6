"""What LoRAs change of a parameter, added to it row by row.

A rank that keeps rows [a, b) of W reads rows [a, b) of `up` and `diff` only, and the product is added chunk by chunk:
neither a whole update nor a whole file is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .lora import Lora
from .updates import LowRank, ReadRows, Update

CHUNK_BYTES = 32 << 20
"""Of the float32 rows that are summed at a time."""


def changes(loras: Iterable[Lora], name: str, *, without_products: bool = False) -> bool:
    """Whether any of `loras` changes parameter `name`, by more than products of two matrices or at all."""
    return bool(_updates(loras, name, without_products))


def merge(
    loras: Iterable[Lora],
    name: str,
    rows: Tensor,
    first_row: int,
    read_rows: ReadRows | None = None,
    *,
    without_products: bool = False,
) -> None:
    """Adds in place what `loras` change in rows [first_row, ...) of parameter `name`.

    Summed in float32 and rounded once, however many there are. Changes that depend on the weight see it as it is in the
    checkpoint, and add up.

    Args:
        rows: [n, ...], contiguous, of any device and a float dtype that torch can round to.
        read_rows: gives any rows of the parameter as it is in the checkpoint; None: nobody asks for other ones.
        without_products: leave out products of two matrices, which stay beside the weight (beside.py).
    Raises:
        OSError: a file cannot be read any more, or ended early.
    """
    updates = _updates(loras, name, without_products)
    if not updates or rows.numel() == 0:
        return
    flat = rows.view(rows.shape[0], -1)

    def these(first: int, count: int) -> Tensor:
        assert first_row <= first and first + count <= first_row + flat.shape[0], "rows that nobody reads"
        return flat[first - first_row :][:count].float()

    adders = [update.adder(first_row, flat.shape[0], flat.device, read_rows or these) for update in updates]
    needs_base = any(update.needs_base for update in updates)
    step = max(CHUNK_BYTES // (4 * flat.shape[1]), 1)
    for start in range(0, flat.shape[0], step):
        piece = flat[start : start + step]
        total = piece.float()
        base = total.clone() if needs_base else total
        for add in adders:
            add(total, start, base)
        piece.copy_(total)


def _updates(loras: Iterable[Lora], name: str, without_products: bool) -> list[Update]:
    updates = (update for lora in loras for update in lora.updates.get(name, ()))
    return [update for update in updates if not (without_products and isinstance(update, LowRank))]
