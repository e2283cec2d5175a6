"""Which of a LoRA's changes are used: those of some blocks, or without some layers.

Loads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Selection:
    """As ComfyUI-WanVideoWrapper's block selection has it: what is in no block is always used."""

    blocks: tuple[int, ...] = ()
    """Their numbers; empty: all."""
    without: tuple[str, ...] = ()
    """Layers whose names, such as "diffusion_model.blocks.0.self_attn.q", have one of these in them are left out."""

    def has(self, layer: str) -> bool:
        """layer: its official name, such as "blocks.0.self_attn.q"."""
        if any(part in f"diffusion_model.{layer}" for part in self.without):
            return False
        kind, _, rest = layer.partition(".")
        if not self.blocks or not kind.endswith("blocks"):
            return True
        # VACE's own blocks cannot be chosen.
        return kind == "blocks" and int(rest.partition(".")[0]) in self.blocks

    def __str__(self) -> str:
        """ "blocks 0, 1; without ffn"; empty for everything."""
        parts = [f"blocks {', '.join(map(str, self.blocks))}"] if self.blocks else []
        parts += [f"without {', '.join(self.without)}"] if self.without else []
        return "; ".join(parts)


EVERYTHING = Selection()
