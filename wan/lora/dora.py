"""DoRA: a changed weight whose rows have learned lengths (Liu et al., 2024, arXiv 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..files.stored_tensor import StoredTensor
from .updates import Adder, ReadRows, Update, read_elements


@dataclass(frozen=True, slots=True)
class Decomposed:
    """strength * (magnitude * (W + change) / |W + change| - W), with the length of each row of W + change.

    The lengths are those of the changed weight, as in the paper, PEFT and LyCORIS. At strengths other than 1 the three
    programs that merge such files differ; between W and the whole change lies a line here, as in ComfyUI.
    """

    needs_base: ClassVar[bool] = True
    change: Update
    """At strength 1."""
    magnitude: StoredTensor
    """As many elements as W has rows."""
    strength: float

    def adder(self, first: int, count: int, device: torch.device, read_rows: ReadRows) -> Adder:
        add_change = self.change.adder(first, count, device, read_rows)
        lengths = read_elements(self.magnitude, first, count).view(count, 1).to(device)

        def add(rows: Tensor, start: int, base: Tensor) -> None:
            changed = base.clone()
            add_change(changed, start, base)
            # A row of zeros has no direction; it stays one.
            found = torch.linalg.vector_norm(changed, dim=1, keepdim=True).clamp_min(torch.finfo(changed.dtype).tiny)
            # Not by their quotient, which may be beyond all floats.
            changed.div_(found).mul_(lengths[start : start + rows.shape[0]])
            rows.add_(changed.sub_(base), alpha=self.strength)

        return add
