"""Makes the tables of what whole_job.py, memory.py and every_switch.py measured.

    python benchmarks/tables.py results.jsonl            prints them
    python benchmarks/tables.py results.jsonl --readme   writes them into README.md

What README.md has between their two marks is replaced.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import every_switch
import memory
from table import replace_marked

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- jobs: made by tables.py -->", "<!-- jobs: end -->"
WHOLE_JOB = ("label", "device", "model", "size", "steps", "pictures", "guidance", "text", "gpus", "start")
MEMORY = ("device", "model", "size", "pictures", "gpus", "cap")
SWITCHES = ("device", "model", "size", "switch")
"""What tells one measurement of its kind from another; of equals the last counts."""
SPANS = ("processes", "imports", "encode", "load", "first_step", "steps", "decode", "write", "end", "total")
WORDS = {"none": "", "off": "", "given": "", "encoded": "prompt encoded in the job", "ulysses": "guided, Ulysses",
         "cfg": "guided, CFG parallel", "start": "start image", "start+end": "start and end image"}  # fmt: skip

Line = dict[str, Any]


def read_lines(path: Path, benchmark: str, key: tuple[str, ...]) -> list[Line]:
    """The last line for each key, in the order in which they first came; those of an older form are left out."""
    lines: dict[tuple[Any, ...], Line] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["benchmark"] == benchmark and "command" in line:
            line["device"] = line.get("settings", {}).get("device", "").partition(" x ")[2]
            lines[tuple(line.get(name) for name in key)] = line
    return list(lines.values())


def whole_jobs(lines: list[Line]) -> str:
    """Markdown: seconds of each part of a job, and their sum."""
    labels = ["build"] if any(line["label"] for line in lines) else []
    head = [*labels, "model", "job", "GPUs", "start", *(name.replace("_", " ") for name in SPANS),
            "s per step", "load, of a plain read", "mp4 MB", "GPU GiB", "latents differ"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for line in lines:
        job = [line["size"], f"{line['steps']} steps"]
        job += [WORDS[line[name]] for name in ("pictures", "guidance", "text") if WORDS[line[name]]]
        reads, rate = line["plain_read_gb_per_s"], line["load_gb_per_s"]
        beside = f" of {max(reads.values())}" if reads else ""
        rows.append([
            *[line["label"] for _ in labels], line["model"], ", ".join(job), line["gpus"], line["start"],
            *(f"{line['seconds'][name]:.2f}" if name in line["seconds"] else "" for name in SPANS),
            f"{line['seconds_per_step']:.3f}", f"{rate}{beside} GB/s" if rate else "",
            line["mp4_mb"], max(line["peak_gpu_gib"]), f"{line['latents_difference']:.1e}",
        ])  # fmt: skip
    devices = sorted({(line["device"], line["settings"]["torch"], line["python"]) for line in lines})
    where = "; ".join(f"{device}, torch {torch}, Python {python}" for device, torch, python in devices)
    text = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    return f"{where}\n\n{text}"


def main() -> None:
    path = Path(sys.argv[1])
    parts = [
        ("Whole jobs", whole_jobs, read_lines(path, "whole_job", WHOLE_JOB)),
        ("Planner and truth", memory.table, read_lines(path, "memory", MEMORY)),
        ("Every switch once", every_switch.table, read_lines(path, "switches", SWITCHES)),
    ]
    content = "\n\n".join(f"### {title}\n\n{table(lines)}" for title, table, lines in parts if lines)
    if not content:
        raise ValueError(f"{path} holds no line of whole_job.py, memory.py or every_switch.py")
    if "--readme" not in sys.argv[2:]:
        print(content)
        return
    readme = HERE / "README.md"
    readme.write_text(replace_marked(readme.read_text(), content, BEGIN, END))


if __name__ == "__main__":
    main()
