"""The model card: what the weights are, what they were made from, what they are not."""

from __future__ import annotations

import csv
from pathlib import Path

from .trained_files import trained
from .world import BACKGROUNDS, COLOURS, FRAMES, HEIGHT, MOTIONS, SHAPES, WIDTH, kinds

_TEXT = """\
# Shapes: the demo's model

Wan2.2's architectures in small, in the released files' formats (ComfyUI's single files, float16). It shows one or two
plain shapes that move, {width}x{height}, {frames} frames, and nothing else.

- Shapes: {shapes}. Colours: {colours}. Backgrounds: {backgrounds}. Motions: {motions}.
- Made from: clips drawn by `demo/train/world.py` and captions of `demo/train/captions.py`. No other data and no other
  weights were used.
- Trained for eight minutes on one H200 (`python demo/train --part PART`: the VAE, both text-to-video experts with the
  text encoder, the image-to-video experts beside the LoRAs), after twelve minutes of the VAE and before twenty of the
  text-to-video experts (`--finish`) on two CPU cores. `curves` has the losses, `samples` sheets of held-out captions.
- Limits: outlines are rough; spinning was not learned: a thing that should spin stays and loses its shape; of two
  things one may take the other's colour or shape; other words and other sizes mean nothing to it.
- Not seen in training: {held} of {all} combinations of colour, shape and motion (`world.held_out`).
  `python demo/meaning MODELS` measures how well they are shown.
- Sampling: as the released models. Text to video: 20 steps, shift 12, guidance 4 and 3, boundary 0.875; with the LoRAs
  4 steps, Euler, shift 5, guidance 1. Image to video: 20 steps, shift 5, guidance 3.5, boundary 0.9.
- Licence: that of this repository.

| file | MiB |
| --- | --- |
{files}

| part | steps | loss at the end |
| --- | --- | --- |
{losses}
"""


def write_card(models: Path) -> None:
    """Writes MODEL_CARD.md beside the files that are there."""
    files = "\n".join(f"| {path.relative_to(models)} | {path.stat().st_size / 2**20:.1f} |" for path in trained(models))
    held, others = (len(kinds(held=side)) for side in (True, False))
    text = _TEXT.format(
        width=WIDTH, height=HEIGHT, frames=FRAMES, shapes=", ".join(SHAPES), colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS), motions=", ".join(MOTIONS), held=held, all=held + others, files=files,
        losses="\n".join(_last_losses(models / "curves")),
    )  # fmt: skip
    (models / "MODEL_CARD.md").write_text(text)


def _last_losses(curves: Path) -> list[str]:
    lines = []
    for path in sorted(curves.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            losses = ", ".join(f"{name} {value}" for name, value in rows[-1].items() if name != "step")
            lines.append(f"| {path.stem} | {rows[-1]['step']} | {losses} |")
    return lines
