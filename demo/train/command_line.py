"""The command line of the training."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import distill, dit, i2v, small_vae
from .card import write_card
from .loop import Budget
from .samples import write_samples
from .sizes import FULL, SMOKE
from .trained_files import MAX_ALL, trained

PARTS = {"vae": small_vae.train, "dit": dit.train, "i2v": i2v.train, "distill": distill.train}
"""In the order in which they need each other."""


def main(arguments: list[str] | None = None) -> int:
    """Trains one part within its minutes, or goes on with it; writes its files, curves and samples."""
    parser = argparse.ArgumentParser(prog="python demo/train", description=main.__doc__)
    parser.add_argument("--part", required=True, choices=PARTS)
    parser.add_argument("--out", required=True, type=Path, help="a ComfyUI models folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="of training; files and samples take half a minute")
    parser.add_argument("--steps", type=int, help="of the part in all, where minutes do not end it earlier")
    parser.add_argument("--samples", type=int, default=6, help="clips on the sample sheet; 0: none")
    parser.add_argument("--finish", action="store_true", help="a part's last call: the learning rate falls to 0")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows on a CPU that everything works")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    # A part's convolutions have a few shapes, each thousands of times.
    torch.backends.cudnn.benchmark = True
    budget = Budget(seconds=60 * options.minutes, steps=options.steps, finish=options.finish)
    PARTS[options.part](options.out, SMOKE if options.smoke else FULL, budget, device)
    if options.samples:
        print(f"samples: {write_samples(options.part, options.out, count=options.samples, device=device)}")
    write_card(options.out)
    total = 0
    for file in trained(options.out):
        total += file.stat().st_size
        print(f"{file.relative_to(options.out)}: {file.stat().st_size / 2**20:.1f} MiB")
    print(f"together {total / 2**20:.1f} MiB; at most {MAX_ALL >> 20}")
    return 0
