"""Predicts the time of a forward on more GPUs than were measured, from runs on one and on two.

    python benchmarks/scaling.py [results.jsonl]

Writes scaling.svg beside README.md, and the table in README.md between its two marks. The model, for P GPUs that share
one sequence:

    seconds(P) = compute / P + exchange(P) + rest(P)

compute is all of the time on one GPU. exchange(P) is two all-to-alls per layer, 4 * S / P * C elements of which the
share (P - 1) / P goes to others, at the rate measured between two GPUs. rest(2) is what is left of the time measured on
two. What it does on more GPUs is not known: either it shrinks with the tokens of a GPU, as packing, norms and rotations
do, or it stays, as gaps between kernels and ranks that wait for each other do. The prediction is the range between.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from breakdown import floor_seconds
from pack import mount_pack
from table import replace_marked

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- scaling: made by scaling.py -->", "<!-- scaling: end -->"
GPUS = (1, 2, 4, 8)
EXCHANGE_BYTES = 257e9
"""Per second: one packed all-to-all of q, k and v at 32,760 tokens between two H200 (NCCL, NVLink)."""
ELEMENT_BYTES = 2
WIDTH, HEIGHT, MARGIN = 640, 320, 50
"""Pixels of the plot and of the room for its axes."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Of one model and size.

    Args:
        one, two: seconds of a forward, measured on one and on two GPUs.
        floor: seconds on one GPU of the matrix products and the attention alone.
        exchanged: bytes that all ranks together hold of q, k, v and the attention's result, over all layers.
    """

    one: float
    two: float
    floor: float
    exchanged: float

    def exchange(self, gpus: int) -> float:
        """Seconds in all-to-alls."""
        return self.exchanged / gpus * (gpus - 1) / gpus / EXCHANGE_BYTES

    @property
    def rest(self) -> float:
        """Seconds on two GPUs that neither half of the compute nor the exchange accounts for."""
        return max(0.0, self.two - self.one / 2 - self.exchange(2))

    def predict(self, gpus: int) -> tuple[float, float]:
        """Seconds if the rest shrinks with a GPU's tokens, and if it stays. Of one and two: as measured."""
        if gpus <= 2:
            measured = self.one if gpus == 1 else self.two
            return measured, measured
        known = self.one / gpus + self.exchange(gpus)
        return known + self.rest * 2 / gpus, known + self.rest


def read_scaling(path: Path) -> Scaling:
    """From the fastest pair of A14B runs of real_size.py at 832x480x81, without FSDP.

    Raises:
        ValueError: there is no such pair.
    """
    from wan_pack.benchmarks.released_sizes import WAN_CONFIGS

    best: dict[int, float] = {}
    for text in path.read_text().splitlines():
        line: dict[str, Any] = json.loads(text)
        if (line["benchmark"], line.get("model"), line.get("size")) == ("real_size", "t2v-A14B", "832x480x81") and not (
            line["settings"]["fsdp"]
        ):
            best[line["gpus"]] = min(line["seconds_per_step"], best.get(line["gpus"], float("inf")))
    if not {1, 2} <= best.keys():
        raise ValueError(f"{path} holds runs on {sorted(best)} GPUs; one and two are needed")
    config = WAN_CONFIGS["t2v-A14B"]
    tokens = 21 * 30 * 52
    floor = floor_seconds(config, tokens, 1, attention="fa3", precision="full")
    return Scaling(best[1], best[2], floor, 4.0 * tokens * config.dim * ELEMENT_BYTES * config.num_layers)


def table(scaling: Scaling) -> str:
    """Markdown."""
    rows = ["| GPUs | s per forward | times one GPU | guided step, Ulysses | guided step, CFG 2 x Ulysses | floor |",
            "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for gpus in GPUS:
        low, high = scaling.predict(gpus)
        halves = scaling.predict(gpus // 2) if gpus > 1 else None
        cells = [
            gpus, _range(low, high, 3), _range(scaling.one / high, scaling.one / low, 2), _range(2 * low, 2 * high, 2),
            "-" if halves is None else _range(*halves, 2), f"{scaling.floor / gpus:.3f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def plot(scaling: Scaling) -> str:
    """SVG: seconds against GPUs, both to the power of two, with the floor below."""
    top, bottom = scaling.one * 1.1, scaling.floor / GPUS[-1] / 1.2

    def at(index: int, seconds: float) -> str:
        y = log(top / seconds) / log(top / bottom)
        x = index / (len(GPUS) - 1)
        return f"{MARGIN + x * (WIDTH - 2 * MARGIN):.1f},{MARGIN / 2 + y * (HEIGHT - 1.5 * MARGIN):.1f}"

    lows = [at(i, scaling.predict(gpus)[0]) for i, gpus in enumerate(GPUS)]
    highs = [at(i, scaling.predict(gpus)[1]) for i, gpus in enumerate(GPUS)]
    floor = " ".join(at(i, scaling.floor / gpus) for i, gpus in enumerate(GPUS))
    parts = [
        f'<polygon points="{" ".join(lows + highs[::-1])}" fill="#4c72b0" fill-opacity="0.3"/>',
        f'<polyline points="{" ".join(highs[:2])}" fill="none" stroke="#4c72b0" stroke-width="2"/>',
        f'<polyline points="{floor}" fill="none" stroke="#999" stroke-dasharray="4"/>',
    ]
    for i, gpus in enumerate(GPUS):
        low, high = scaling.predict(gpus)
        x, y = at(i, high).split(",")
        parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{gpus} GPU</text>')
        parts.append(f'<text x="{x}" y="{float(y) - 8:.1f}" text-anchor="middle">{_range(low, high, 2)} s</text>')
    parts.append(f'<text x="{MARGIN}" y="{HEIGHT - 40}">dashed: matrix products and attention alone</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _range(low: float, high: float, digits: int) -> str:
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == last else f"{first} to {last}"


def main(arguments: list[str]) -> None:
    scaling = read_scaling(Path(arguments[0]) if arguments else HERE / "results.jsonl")
    (HERE / "scaling.svg").write_text(plot(scaling))
    readme = HERE / "README.md"
    readme.write_text(replace_marked(readme.read_text(), table(scaling), BEGIN, END))


if __name__ == "__main__":
    mount_pack()
    main(sys.argv[1:])
