"""Makes a table and a plot of what forward.py measured.

    python benchmarks/table.py variants.jsonl

Writes forward.svg beside README.md, and the table in README.md between its two marks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- forward: made by table.py -->", "<!-- forward: end -->"
COLUMNS = ("attention", "gemm", "elementwise", "communication", "idle")
COLOURS = dict(zip(COLUMNS, ("#4c72b0", "#55a868", "#dd8452", "#c44e52", "#bbbbbb"), strict=True))
ROW, LEFT, WIDTH = 22, 330, 560
"""Pixels: height of a bar with its gap, room for names, the longest bar."""

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The last line for each system, size and number of GPUs, in the order in which they first came."""
    lines: dict[tuple[Any, ...], Line] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["benchmark"] == "forward":
            lines[line["model"], line["size"], line["gpus"], line["system"]] = line
    if not lines:
        raise ValueError(f"{path} holds no line of forward.py")
    return list(lines.values())


def table(lines: list[Line]) -> str:
    """Markdown."""
    head = ["GPUs", "size", "system", "attention", "s per forward", "TFLOP/s per GPU", "of the floor", "peak GiB",
            *(f"{kind} ms" for kind in COLUMNS), "output differs", "latents differ"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for line in lines:
        rows.append([
            line["gpus"], line["size"], line["system"], line["attention"], f"{line['seconds']:.3f}",
            line["tflops_per_gpu"], f"{line['floor_share']:.0%}", line["peak_gib"],
            *(line["block_ms"][kind] for kind in COLUMNS), line["difference"], line.get("latents_difference", ""),
        ])  # fmt: skip
    device, torch = lines[-1]["device"], lines[-1]["torch"]
    text = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    return f"{device}, torch {torch}; ms are per block, differences relative to the first system.\n\n{text}"


def plot(lines: list[Line]) -> str:
    """SVG: a bar for each line, as long as its seconds among those of its size, split by `block_ms`."""
    longest = {line["size"]: max(o["seconds"] for o in lines if o["size"] == line["size"]) for line in lines}
    parts = []
    for index, line in enumerate(lines):
        y, x = 30 + ROW * index, float(LEFT)
        whole = sum(line["block_ms"].values()) or 1.0
        scale = WIDTH * line["seconds"] / longest[line["size"]] / whole
        name = f"{line['size']}, {line['gpus']} GPU, {line['system']}"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for kind in COLUMNS:
            width = line["block_ms"][kind] * scale
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 6}" fill="{COLOURS[kind]}"/>')
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{line["seconds"]:.3f} s</text>')
    for index, kind in enumerate(COLUMNS):
        x = LEFT + 115 * index
        parts.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 17}" y="16">{kind}</text>')
    size = f'width="{LEFT + WIDTH + 90}" height="{40 + ROW * len(lines)}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def replace_marked(text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """Puts `content` between the marks of `text`; at its end, with marks, where it has none."""
    block = f"{begin}\n\n{content}\n\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, rest = text.split(begin)
    return before + block + rest.split(end)[1]


def main() -> None:
    lines = read_lines(Path(sys.argv[1]))
    (HERE / "forward.svg").write_text(plot(lines))
    readme = HERE / "README.md"
    content = f"### Seconds per forward, by variant\n\n![bars](forward.svg)\n\n{table(lines)}"
    readme.write_text(replace_marked(readme.read_text(), content))


if __name__ == "__main__":
    main()
