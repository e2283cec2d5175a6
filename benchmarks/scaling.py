"""Predicts the time of a forward on eight GPUs from runs on one, two and four.

    python benchmarks/scaling.py [results.jsonl]

Writes scaling.svg beside README.md, and the table in README.md between its two marks. The model, for P GPUs that share
one sequence:

    seconds(P) = compute / P + exchange(P) + rest(P)

compute is all of the time on one GPU. exchange(P) is two all-to-alls per layer, 4 * S / P * C elements of which the
share (P - 1) / P goes to others, at the rate measured between four GPUs. rest(P) is what is left of a time that was
measured: kernels on fewer tokens and heads, gaps between them, ranks that wait for each other. What it does on more
GPUs is not known: either it shrinks with the tokens of a GPU, or it stays. The prediction is the range between, from
the rest on the most GPUs that were measured. The same from one and two alone says how far such a range is to be
trusted: four were measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from breakdown import floor_seconds
from forward import parse_size
from pack import mount_pack
from table import replace_marked

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- scaling: made by scaling.py -->", "<!-- scaling: end -->"
GPUS = (1, 2, 4, 8)
MEASURED = GPUS[:-1]
MODEL = "t2v-A14B"
COLOURS = {"480p": "#4c72b0", "720p": "#dd8452"}
WIDTH, HEIGHT, MARGIN = 640, 400, 50
"""Pixels of the plot and of the room for its axes."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Of one model and size.

    Args:
        seconds: of a forward, by the number of GPUs on which it was measured; one and four among them.
        floor: seconds on one GPU of the matrix products and the attention alone.
        exchange_of_four: seconds that the all-to-alls of a forward take on four GPUs, measured alone.
    """

    seconds: Mapping[int, float]
    floor: float
    exchange_of_four: float

    def exchange(self, gpus: int) -> float:
        """Seconds in all-to-alls."""
        return self.exchange_of_four * (gpus - 1) / gpus**2 / (3 / 16)

    def rest(self, gpus: int) -> float:
        """Seconds of those measured that neither a share of the compute nor the exchange accounts for."""
        return max(0.0, self.seconds[gpus] - self.seconds[1] / gpus - self.exchange(gpus))

    def predict(self, gpus: int, most: int) -> tuple[float, float]:
        """Seconds if the rest on `most` GPUs, which were measured, shrinks with a GPU's tokens, and if it stays."""
        known = self.seconds[1] / gpus + self.exchange(gpus)
        return known + self.rest(most) * most / gpus, known + self.rest(most)

    def range(self, gpus: int) -> tuple[float, float]:
        """As measured, or as predicted from the most that were."""
        if gpus in self.seconds:
            return self.seconds[gpus], self.seconds[gpus]
        return self.predict(gpus, max(self.seconds))


def read_scalings(path: Path) -> dict[str, Scaling]:
    """By size, in the order of the file: the newest line of each number of GPUs.

    Raises:
        ValueError: a size lacks a run, or the exchange between four.
    """
    from wan_pack.benchmarks.released_sizes import WAN_CONFIGS

    seconds: dict[str, dict[int, float]] = {}
    exchange: dict[str, float] = {}
    for text in path.read_text().splitlines():
        line: dict[str, Any] = json.loads(text)
        if line["benchmark"] == "scaling" and line["model"] == MODEL:
            seconds.setdefault(line["size"], {})[line["gpus"]] = line["seconds"]
        elif line["benchmark"] == "exchange" and line["gpus"] == 4:
            exchange[line["size"]] = sum(line["block_ms"].values()) / 1000
    config = WAN_CONFIGS[MODEL]
    scalings = {}
    for size, measured in seconds.items():
        if set(measured) != set(MEASURED) or size not in exchange:
            lacking = "" if size in exchange else " and no exchange"
            raise ValueError(
                f"{path} holds runs at {size} on {sorted(measured)} GPUs{lacking}; "
                f"{list(MEASURED)} and the exchange between four are needed"
            )
        width, height, frames = parse_size(size)
        tokens = (frames + 3) // 4 * (height // 16) * (width // 16)
        floor = floor_seconds(config, tokens, 1, attention="fa3", precision="full")
        scalings[size] = Scaling(measured, floor, exchange[size] * config.num_layers)
    if not scalings:
        raise ValueError(f"{path} holds no run on {list(MEASURED)} GPUs")
    return scalings


def table(scalings: Mapping[str, Scaling]) -> str:
    """Markdown: what is measured and predicted, then how well fewer GPUs would have predicted four."""
    head = ["size", "GPUs", "s per forward", "times one GPU", "guided step, Ulysses"]
    head += ["guided step, CFG 2 x Ulysses", "floor"]
    rows = [f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for size, scaling in scalings.items():
        for gpus in GPUS:
            low, high = scaling.range(gpus)
            one = scaling.seconds[1]
            cells = [
                size, gpus, _range(low, high, 3), _range(one / high, one / low, 2), _range(2 * low, 2 * high, 2),
                _range(*scaling.range(gpus // 2), 2) if gpus > 1 else "-", f"{scaling.floor / gpus:.3f}",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(map(str, cells))} |")
    head = ["size", "exchange on four, s", "rest on two, on four", "four, predicted from one and two", "four, measured"]
    rows += ["", f"| {' | '.join(head)} |", "| --- | --- | --- | --- | --- |"]
    for size, scaling in scalings.items():
        predicted = _range(*scaling.predict(4, 2), 3)
        rest = f"{scaling.rest(2):.3f}, {scaling.rest(4):.3f}"
        rows.append(f"| {size} | {scaling.exchange(4):.3f} | {rest} | {predicted} | {scaling.seconds[4]:.3f} |")
    return "\n".join(rows)


def plot(scalings: Mapping[str, Scaling]) -> str:
    """SVG: seconds against GPUs, both to the power of two, with the floors below."""
    top = max(scaling.seconds[1] for scaling in scalings.values()) * 1.2
    bottom = min(scaling.floor for scaling in scalings.values()) / GPUS[-1] / 1.5

    def at(index: int, seconds: float) -> str:
        y = log(top / seconds) / log(top / bottom)
        x = index / (len(GPUS) - 1)
        return f"{MARGIN + x * (WIDTH - 2 * MARGIN):.1f},{MARGIN / 2 + y * (HEIGHT - 1.5 * MARGIN):.1f}"

    parts = []
    for size, scaling in scalings.items():
        colour = COLOURS.get(size, "#555")
        lows, highs = ([at(i, scaling.range(gpus)[end]) for i, gpus in enumerate(GPUS)] for end in (0, 1))
        floor = " ".join(at(i, scaling.floor / gpus) for i, gpus in enumerate(GPUS))
        known = len(scaling.seconds)
        fan = " ".join(lows[known - 1 :] + highs[: known - 1 : -1])
        parts += [
            f'<polygon points="{fan}" fill="{colour}" fill-opacity="0.3"/>',
            f'<polyline points="{" ".join(highs[:known])}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<polyline points="{floor}" fill="none" stroke="#999" stroke-dasharray="4"/>',
            f'<text x="{MARGIN + 8}" y="{float(highs[0].split(",")[1]) + 22:.1f}" fill="{colour}">{size}</text>',
        ]
        for place, gpus in zip(highs, GPUS, strict=True):
            x, y = place.split(",")
            text = f"{_range(*scaling.range(gpus), 2)} s"
            parts.append(f'<text x="{x}" y="{float(y) - 8:.1f}" text-anchor="middle">{text}</text>')
    for i, gpus in enumerate(GPUS):
        x = at(i, top).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{gpus} GPU</text>')
    parts.append(f'<text x="{MARGIN}" y="{HEIGHT - 30}">dashed: matrix products and attention alone</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _range(low: float, high: float, digits: int) -> str:
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == last else f"{first} to {last}"


def main(arguments: list[str]) -> None:
    scalings = read_scalings(Path(arguments[0]) if arguments else HERE / "results.jsonl")
    (HERE / "scaling.svg").write_text(plot(scalings))
    readme = HERE / "README.md"
    readme.write_text(replace_marked(readme.read_text(), table(scalings), BEGIN, END))


if __name__ == "__main__":
    mount_pack()
    main(sys.argv[1:])
