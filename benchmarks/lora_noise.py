"""What merging into 8 bits leaves of a LoRA, on random weights: the rounding's noise, and the share that is applied.

    python benchmarks/lora_noise.py

Prints a table: of each file, strength of the LoRA and way to keep it the error of the weights (relative, all of them),
the slope of their change against the LoRA's (1: applied as it should be, 0: lost), and the error of the layer's output
for inputs that the LoRA is about, relative to what the LoRA adds there.
"""

from __future__ import annotations

import argparse

import torch
from pack import mount_pack
from torch import Tensor

SIDE, RANK, STD = 2048, 32, 0.02
WAYS = ("new scales", "the file's scales", "beside")


def base_weight(dtype: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor]:
    """The values of a file, and its scales [SIDE, 1]."""
    from wan_pack.wan.model.eight_bits import quantise_rows

    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * STD
    if dtype == torch.bfloat16:
        return weight.bfloat16().float(), torch.ones(SIDE, 1)
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = weight.abs().amax() / largest
    codes, scales = quantise_rows(weight, dtype, None if per_row else scale.expand(SIDE, 1))
    return codes.float() * scales, scales


def kept(exact: Tensor, base: Tensor, scales: Tensor, dtype: torch.dtype, way: str, up: Tensor, down: Tensor) -> Tensor:
    """The weight that products see."""
    from wan_pack.wan.model.eight_bits import quantise_rows

    if way == "beside":
        return base + up.bfloat16().float() @ down.bfloat16().float()
    if dtype == torch.bfloat16:
        return exact.bfloat16().float()
    codes, scale = quantise_rows(exact, dtype, scales if way == "the file's scales" else None)
    return codes.float() * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1])
    arguments = parser.parse_args()
    mount_pack()
    files = {
        "fp8 by tensor": (torch.float8_e4m3fn, False),
        "fp8 by row": (torch.float8_e4m3fn, True),
        "int8 by row": (torch.int8, True),
        "bf16": (torch.bfloat16, True),
    }
    print("| LoRA of | file | kept | noise % | slope | error of its outputs % |\n| --- | --- | --- | --- | --- | --- |")
    for strength in arguments.strengths:
        for name, (dtype, per_row) in files.items():
            base, scales = base_weight(dtype, per_row)
            generator = torch.Generator().manual_seed(1)
            up, down = (torch.randn(shape, generator=generator) for shape in ((SIDE, RANK), (RANK, SIDE)))
            up = up * (strength * base.norm() / (up @ down).norm())
            change = up @ down
            inputs = down.T @ torch.randn(RANK, 256, generator=generator)
            for way in WAYS if dtype != torch.bfloat16 else ("merged",):
                off = kept(base + change, base, scales, dtype, way, up, down) - (base + change)
                noise = off.norm() / (base + change).norm()
                slope = 1 + (off * change).sum() / change.square().sum()
                outputs = (off @ inputs).norm() / (change @ inputs).norm()
                cells = (f"{strength:.1%}", name, way, f"{noise:.2%}", f"{slope:.2f}", f"{outputs:.0%}")
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
