"""Loss curves as CSV, and as a picture in SVG."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

Curve = Sequence[tuple[int, dict[str, float]]]
_SIZE = (640, 360)
_INKS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def write_curves(folder: Path, part: str, curve: Curve) -> None:
    """Writes <part>.csv and <part>.svg; of fewer than two points the CSV alone."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(curve[0][1]) if curve else []
    with (folder / f"{part}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *names])
        writer.writerows([step, *(f"{means[name]:.6g}" for name in names)] for step, means in curve)
    if len(curve) > 1:
        (folder / f"{part}.svg").write_text(_svg(part, names, curve))


def read_curve(folder: Path, part: str) -> list[tuple[int, dict[str, float]]]:
    """What `write_curves` wrote; empty if it did not."""
    path = folder / f"{part}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [(int(row.pop("step")), {name: float(value) for name, value in row.items()}) for row in rows]


def _svg(part: str, names: Sequence[str], curve: Curve) -> str:
    width, height = _SIZE
    steps = [step for step, _ in curve]
    logs = {name: [math.log10(max(means[name], 1e-9)) for _, means in curve] for name in names}
    low, high = min(map(min, logs.values())), max(map(max, logs.values()))
    lines = []
    for ink, (name, values) in zip(_INKS, logs.items(), strict=False):
        points = " ".join(
            f"{50 + (width - 70) * (step - steps[0]) / (steps[-1] - steps[0]):.1f},"
            f"{20 + (height - 60) * (high - value) / (high - low or 1):.1f}"
            for step, value in zip(steps, values, strict=True)
        )
        lines.append(f'<polyline fill="none" stroke="{ink}" points="{points}"/>')
        lines.append(f'<text x="{width - 150}" y="{40 + 16 * len(lines) // 2}" fill="{ink}">{name}</text>')
    labels = f'<text x="4" y="26">{10**high:.3g}</text><text x="4" y="{height - 40}">{10**low:.3g}</text>'
    labels += f'<text x="50" y="{height - 12}">{part}: loss (logarithmic) by step, {steps[0]} to {steps[-1]}</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
    return f'{head}font-size="12"><rect width="100%" height="100%" fill="white"/>{labels}{"".join(lines)}</svg>\n'
