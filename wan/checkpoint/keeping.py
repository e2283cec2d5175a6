"""Which weights of a checkpoint are kept in 8 bits, and which LoRAs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from ..lora.beside import lora_rank
from ..lora.lora import Lora
from ..lora.merging import changes
from ..model.config import WanConfig
from ..model.eight_bits import E4M3, KeptWeight
from ..model.linear import FP8_PRODUCTS
from .checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Keeping:
    """How the weights of a model are kept."""

    linear_precision: str = "full"
    """full: fp8 as the file has it, all else as floats. fp8: the large layers (`FP8_PRODUCTS`) multiply e4m3 codes, the
    file's where it has them, or made of its values. int8: the file's codes, fp8 or int8, stay as they are; the large
    layers of other files are rounded to int8, row by row."""
    quantised_loras: str = "merged"
    """beside: products of LoRAs on weights that a file has in 8 bits are computed beside these (`Linear`)."""
    exact_blocks: tuple[int, ...] = ()
    """Numbers of blocks whose weights stay as the file has them, whatever `linear_precision` is."""

    def weights(self, checkpoint: Checkpoint, loras: Sequence[Lora] = ()) -> dict[str, KeptWeight]:
        """The matrices that are kept in 8 bits; what LoRAs change of them gets a scale for each row."""
        kept = {
            name: weight
            for name, weight in checkpoint.codes.items()
            if weight.dtype != torch.int8 or self.linear_precision == "int8"
        }
        rounded_here = set()
        if self.linear_precision != "full":
            wanted = E4M3 if self.linear_precision == "fp8" else torch.int8
            for layer in self._large_layers(checkpoint.config):
                name = f"{layer}.weight"
                if name not in kept or (wanted == E4M3 and kept[name].dtype != E4M3):
                    kept[name] = KeptWeight(wanted, scaled=True)
                    rounded_here.add(name)
        for name, weight in kept.items():
            # Into values that are only rounded afterwards a LoRA is merged without loss.
            beside = self.quantised_loras == "beside" and name not in rounded_here
            rank = lora_rank(loras, name) if beside else 0
            kept[name] = replace(
                weight, lora_rank=rank, scaled=weight.scaled or changes(loras, name, without_products=rank > 0)
            )
        return kept

    def fp8_products(self, config: WanConfig) -> list[str]:
        """Names of the layers that multiply fp8 by fp8."""
        return self._large_layers(config) if self.linear_precision == "fp8" else []

    def _large_layers(self, config: WanConfig) -> list[str]:
        exact = config.with_vace_blocks(self.exact_blocks)
        blocks = [block for block in config.block_names if block not in exact]
        return [f"{block}.{layer}" for block, layer in product(blocks, FP8_PRODUCTS)]


MERGED = Keeping()
