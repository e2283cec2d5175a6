"""How the golden cases are spread over processes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

WITHOUT_LAYOUT = ("vae_", "t5_encoder")
"""Cases without a transformer: one layout is all."""
GUIDED = "gen_"
"""Cases of whole loops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the ranks of one run."""

    rank: int
    world: int
    store: Path
    layouts: tuple[tuple[Layout, ...], ...]
    """Of each tuple a case runs in one, every case in its turn."""
    guided: tuple[Layout, ...] = ()
    """Of these too a case runs in one, if it is a whole loop, with guidance."""

    def of(self, case: str, number: int) -> list[Layout]:
        """The layouts that a case, `number` in its folder, runs in."""
        if case.startswith(WITHOUT_LAYOUT):
            return [self.layouts[0][0]]
        groups = [*self.layouts, self.guided] if self.guided and case.startswith(GUIDED) else self.layouts
        return [turns[number % len(turns)] for turns in groups]


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
