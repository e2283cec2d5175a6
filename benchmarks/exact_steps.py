"""What exact_steps and exact_blocks leave of the error of 8 bits, in clips of the demo's trained model.

    python benchmarks/exact_steps.py
    python benchmarks/exact_steps.py --captions 2 --steps 4

Prints a table: of each choice decibels of the clips against those of bf16, the share of steps that round, and the share
of clips that show the colour, shape, place and direction of their captions. Without Hopper's units products of fp8 and
attention in 8 bits are emulated.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from pack import ROOT, mount_pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "demo/model", help="folder of the trained model")
    parser.add_argument("--captions", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--exact-steps", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--blocks", nargs="+", default=["", "0, 3"], help="exact_blocks, of four")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    mount_pack()
    import torch
    from wan_pack.demo.meaning.arithmetic import eight_bits
    from wan_pack.demo.meaning.measure import agreement, measure, psnr
    from wan_pack.demo.meaning.pipeline import T2V, Pipeline
    from wan_pack.demo.meaning.verdict import MUST
    from wan_pack.demo.train.captions import held_out_scenes, plain_caption
    from wan_pack.demo.train.dit import T2V as T2V_TASK

    kinds = eight_bits(torch.device(arguments.device))
    scenes, settings = held_out_scenes(arguments.captions), replace(T2V, steps=arguments.steps)
    expected: list[torch.Tensor] = []
    print("| 8 bits | exact_steps | exact_blocks | dB to bf16 | clips that show their captions |")
    print("| --- | --- | --- | --- | --- |")
    for name, arithmetic in kinds.items():
        rounds = bool(expected)
        for blocks in arguments.blocks if rounds else [""]:
            for steps in arguments.exact_steps if rounds else [0]:
                parallel = replace(arithmetic.parallel, exact_steps=steps, exact_blocks=blocks)
                pipeline = Pipeline(
                    arguments.models, T2V_TASK.files, device=arguments.device,
                    arithmetic=replace(arithmetic, parallel=parallel),
                )  # fmt: skip
                clips = [pipeline.clip(plain_caption(scene), settings, seed=seed) for seed, scene in enumerate(scenes)]
                expected = expected or clips
                decibels = [psnr(clip, of_bf16) for clip, of_bf16 in zip(clips, expected, strict=True)]
                shown = [all(agreement(scene, measure(clip))[aspect] for aspect in MUST)
                         for scene, clip in zip(scenes, clips, strict=True)]  # fmt: skip
                distance = f"{statistics.median(decibels):.1f}" if rounds else ""
                print(f"| {name} | {steps} | {blocks} | {distance} | {sum(shown)} of {len(shown)} |", flush=True)


if __name__ == "__main__":
    main()
