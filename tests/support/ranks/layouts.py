"""How the golden cases are spread over processes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

WITHOUT_LAYOUT = ("vae_", "t5_encoder")
"""Cases without a transformer: one layout is all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the ranks of one run."""

    rank: int
    world: int
    store: Path
    layouts: tuple[Layout, ...]
    thin: bool = False
    """A whole loop runs in the first layout and in one other, each in its turn, instead of in all."""

    def wants(self, case: str, number: int, layout: int) -> bool:
        """Whether a case, `number` in its folder, runs in one of the layouts."""
        if layout == 0:
            return True
        if case.startswith(WITHOUT_LAYOUT):
            return False
        return not self.thin or not case.startswith("gen_") or number % (len(self.layouts) - 1) == layout - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How the transformer is spread over the ranks."""

    engine: str
    fsdp: bool = False
    cfg: bool = False
    """Half of the ranks for each prompt of a guided step."""

    def __str__(self) -> str:
        return self.engine + "+fsdp" * self.fsdp + "+cfg" * self.cfg

    @classmethod
    def of(cls, text: str) -> Layout:
        engine, *options = text.split("+")
        if engine not in ("packed", "symmetric", "deepspeed") or not set(options) <= {"fsdp", "cfg"}:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no layout; it is packed, symmetric or deepspeed, then +fsdp, +cfg or both"
            )
        return cls(engine, "fsdp" in options, "cfg" in options)
