"""How the golden cases are spread over processes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the ranks of one run."""

    rank: int
    world: int
    store: Path
    layouts: tuple[Layout, ...]


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
