"""Changes of one half of a layer: of a face's keys or values, which diffusers has in a layer each.

A half is a target as other parameters are, by the name that `to_official` gives it; what changes it changes some rows
of the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..files.diffusers_keys import HALF, whole
from ..files.stored_tensor import StoredTensor, read_from
from .updates import Adder, LowRank, ReadRows, Update

_WHOLE = re.compile(r"(face_adapter\.fuser_blocks\.\d+\.linear1_kv)\.(weight|bias)")


def with_halves(targets: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Parameters and, beside them, the halves that some of them have: name -> shape."""
    found = dict(targets)
    for name, (rows, *rest) in targets.items():
        if match := _WHOLE.fullmatch(name):
            found |= {f"{match[1]}.{half}.{match[2]}": (rows // 2, *rest) for half in "kv"}
    return found


def of_whole(target: str, update: Update, rows: int) -> tuple[str, Update]:
    """The parameter that a change of `target` is one of, and the change of that.

    Args:
        rows: of `target`.
    """
    half = HALF.fullmatch(target)
    if half is None:
        return target, update
    first = 0 if half[2] == "k" else rows
    if isinstance(update, LowRank):
        # Remains one: it may stay beside the weight.
        return whole(target), replace(update, up=_Padded(update.up, first, 2 * rows))
    return whole(target), _OfRows(update, first, rows)


@dataclass(frozen=True, slots=True)
class _Padded:
    """A matrix with rows of zeros around it."""

    stored: StoredTensor
    first: int
    """How many are in front."""
    rows: int
    """Of all."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.stored.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        begin = self.first * math.prod(self.stored.shape[1:]) - start
        read_from(self.stored, out.view(-1).zero_(), begin, staging)


@dataclass(frozen=True, slots=True)
class _OfRows:
    """A change of rows [first, first + count) of W, which sees those alone."""

    needs_base: ClassVar[bool] = True
    """What is inside may."""
    update: Update
    first: int
    count: int

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        begin, end = max(first, self.first), min(first + count, self.first + self.count)
        if begin >= end:
            return lambda rows, start, base: None
        inner = self.update.adder(
            begin - self.first, end - begin, device, lambda one, many: read_rows(self.first + one, many)
        )

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            # Of the rows asked for, those that these are and that are changed.
            low, high = max(begin - first, start), min(end - first, start + rows.shape[0])
            if low < high:
                inner(rows[low - start : high - start], first + low - begin, base[low - start : high - start])

        return add
