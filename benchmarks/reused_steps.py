"""What reuse_threshold does to clips of the demo's trained model: steps reused, and how far the clips are from without.

    python benchmarks/reused_steps.py
    python benchmarks/reused_steps.py --captions 2 --steps 10 --thresholds 0.2

Prints a table: of each number of steps and threshold the share of steps that were reused, decibels of the clips against
those of every step, and the share of clips that show the colour, shape, place and direction of their captions.
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
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 40])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    arguments = parser.parse_args()
    mount_pack()
    from wan_pack.demo.meaning.measure import agreement, measure, psnr
    from wan_pack.demo.meaning.pipeline import T2V, Pipeline
    from wan_pack.demo.meaning.verdict import MUST
    from wan_pack.demo.train.captions import held_out_scenes, plain_caption
    from wan_pack.demo.train.dit import T2V as T2V_TASK

    pipeline = Pipeline(arguments.models, T2V_TASK.files)
    scenes = held_out_scenes(arguments.captions)
    print("| steps | threshold | reused | dB | clips that show their captions |\n| --- | --- | --- | --- | --- |")
    for steps in arguments.steps:
        whole = []
        for threshold in (0.0, *arguments.thresholds):
            settings = replace(T2V, steps=steps, reuse_threshold=threshold)
            clips, reused = [], []
            for seed, scene in enumerate(scenes):
                clips.append(pipeline.clip(plain_caption(scene), settings, seed=seed))
                reused.append(len(pipeline.reused) / steps)
            whole = whole or clips
            decibels = [psnr(clip, reference) for clip, reference in zip(clips, whole, strict=True)]
            shown = [all(agreement(scene, measure(clip))[aspect] for aspect in MUST)
                     for scene, clip in zip(scenes, clips, strict=True)]  # fmt: skip
            distance = "" if threshold == 0 else f"{statistics.median(decibels):.1f}"
            cells = (
                steps,
                f"{threshold:g}",
                f"{statistics.mean(reused):.0%}",
                distance,
                f"{sum(shown)} of {len(shown)}",
            )
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
