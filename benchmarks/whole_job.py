"""Whole jobs through the product's own launcher and warm groups, phase by phase: cold, warm, and after a change.

    python benchmarks/whole_job.py --folder /scratch/wan --models t2v-A14B i2v-A14B --gpus 4 2 1

For each number of GPUs a fresh group of processes runs each combination of --models, --sizes, --pictures, --guidance
and --steps twice: the first job of the group is cold (its files are in the system's cache), the first of another
combination says what it changes, the second of each is warm, with another seed. Each part of a cold start is printed.
Appends a JSON line for each job to benchmarks/results.jsonl; tables.py makes a table of them. On a machine without a
GPU, with `--models tiny tiny-i2v`, the same runs on CPU processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from pack import RESULTS, ROOT, append_results, mount_pack
from phases import Phases
from random_models import write_model
from real_jobs import PICTURES, Shape, another_seed, difference, make_inputs, make_job, moved

GUIDANCE = {"off": False, "cfg": True, "ulysses": True}
"""off: one pass a step. With two: half of the GPUs each (CFG parallel), or all of them one after the other."""
TEXTS = ("given", "encoded")
OF_SHAPE = {"size": str, "pictures": str, "steps": int}
"""What a change can be of beside `guidance` and the settings of Parallel."""
KEEP_WARM = 900.0
READ_THREADS = 8


def combinations(arguments: argparse.Namespace, gpus: int) -> Iterator[tuple[Shape, str]]:
    """Shapes and how they are guided, those of a model together; I2V models from pictures, the others without."""
    for model, size, steps, pictures, guidance in product(
        arguments.models, arguments.sizes, arguments.steps, arguments.pictures, arguments.guidance
    ):
        if ("i2v" in model.split("-")) == (pictures != "none") and not (guidance == "cfg" and gpus % 2):
            yield Shape(model, size, steps, pictures, GUIDANCE[guidance], arguments.text == "encoded"), guidance


def changed(shape: Shape, guidance: str, text: str) -> tuple[Shape, str, str]:
    """What a change NAME=VALUE,... makes of a job: its shape, how it is guided, and what is left, of Parallel."""
    fields, left = {}, []
    for setting in text.split(","):
        name, _, value = setting.partition("=")
        if name in OF_SHAPE:
            fields[name] = OF_SHAPE[name](value)
        elif name == "guidance":
            guidance, fields["guided"] = value, GUIDANCE[value]
        else:
            left.append(setting)
    return dataclasses.replace(shape, **fields), guidance, ",".join(left)


def read_rate(files: list[Path], threads: int, gib: int) -> float:
    """GB per second of reading so much of files that the system has in its cache, which this brings them into."""
    left, pieces = gib << 30, []
    for file in files:
        size = file.stat().st_size
        take = min(size, left)
        # Halves of large files, so that few files keep all threads busy.
        pieces += [(file, at, min(512 << 20, take - at)) for at in range(0, take, 512 << 20)]
        left -= take

    def read(piece: tuple[Path, int, int]) -> int:
        file, at, size = piece
        buffer, done = bytearray(16 << 20), 0
        with file.open("rb", buffering=0) as source:
            source.seek(at)
            while done < size:
                done += source.readinto(buffer)
        return done

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, pieces))
        start = time.perf_counter()
        total = sum(pool.map(read, pieces))
    return round(total / (time.perf_counter() - start) / 1e9, 2)


class Runner:
    """Runs jobs on one number of GPUs in groups of one pool, and makes their lines."""

    def __init__(self, arguments: argparse.Namespace, gpus: int) -> None:
        from wan_pack.distributed.launch.pool import Pool
        from wan_pack.distributed.machine.gpus import choose_gpus

        self.arguments, self.pool = arguments, Pool()
        self.gpus, self.gpu_ids = choose_gpus(gpus)
        self.last: tuple[Shape, str, str] | None = None

    def run(self, shape: Shape, guidance: str, change: str = "") -> tuple[dict[str, Any], Any]:
        """The line of a job, and what it has changed of the latents. change: NAME=VALUE,... of Parallel."""
        from wan_pack.distributed.launch.launcher import run_job

        folder = self.arguments.folder
        job = make_job(
            folder, shape, self.gpu_ids, self.gpus,
            **{"keep_warm_seconds": KEEP_WARM, "cfg_parallel": guidance == "cfg",
               **settings_of([*self.arguments.set, *change.split(",")] if change else self.arguments.set)},
        )  # fmt: skip
        inputs = make_inputs(shape)
        waiting = {group.id for group in self.pool.view()}

        def write(path: Path) -> None:
            from safetensors.torch import save_file

            save_file(inputs, path)

        with Phases(folder / "jobs") as phases:
            result = run_job(job, write, parent=folder / "jobs", failed=folder / "failed", pool=self.pool)
        info = result.info
        spans = phases.spans(info["phases"])
        bytes_read = sum(file.size for file in job.model.high_noise or job.model.low_noise)
        warm = {group.id for group in self.pool.view()} <= waiting
        line: dict[str, Any] = {
            "benchmark": "whole_job", "label": self.arguments.label, "model": shape.model, "gpus": self.gpus,
            "size": "x".join(map(str, shape.pixels)), "steps": shape.steps, "pictures": shape.pictures,
            "guidance": guidance, "text": TEXTS[shape.encodes], "seed": shape.seed,
            "start": self.start_of(shape, guidance, change, kept=warm), "kept_group": warm, "seconds": spans,
            "first_step_done": round(phases.seen.get("step 1", 0.0), 3),
            "start_spans": phases.start_spans(info.get("spans", ())),
            "seconds_per_step": round(min(info["step_seconds"][1:] or info["step_seconds"]), 4),
            "phases": {name: round(seconds, 3) for name, seconds in info["phases"].items()},
            "load_gb_per_s": None if warm or not spans.get("load") else round(bytes_read / spans["load"] / 1e9, 2),
            "mp4_mb": round(result.folder.video(".mp4").stat().st_size / 1e6, 2) if job.decode else None,
            "peak_gpu_gib": [round(n / 2**30, 2) for n in info["peak_gpu_bytes"]],
            "peak_host_gib": [round(n / 2**30, 2) for n in info["peak_rss_bytes"]],
            "settings": info["settings"], "python": platform.python_version(),
            "command": " ".join(["python", "benchmarks/whole_job.py", *sys.argv[1:]]),
        }  # fmt: skip
        self.last = shape, guidance, change
        latents = moved(result.folder.latents, shape)
        result.remove()
        return line, latents

    def start_of(self, shape: Shape, guidance: str, change: str, *, kept: bool) -> str:
        """cold, warm, or what is other than in the job before."""
        if self.last is None:
            return "cold"
        before, was, changed = self.last
        if before.model != shape.model and not kept:
            return "cold"
        names = ("model", "size", "steps", "pictures")
        changes = [f"{getattr(before, name)} -> {getattr(shape, name)}" for name in names
                   if getattr(before, name) != getattr(shape, name)]  # fmt: skip
        changes += [f"guidance {was} -> {guidance}"] if was != guidance else []
        changes += [change or f"{changed} taken back"] if change != changed else []
        return ", ".join(changes) or "warm"


def settings_of(texts: list[str]) -> dict[str, Any]:
    """["use_fsdp=true", "attention=sage"] -> {"use_fsdp": True, "attention": "sage"}"""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r}: it must be NAME=VALUE")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def start_table(line: dict[str, Any]) -> str:
    """What rank 0 did until the first step: when each part began and ended. Some ran side by side."""
    rows = [f"  {at:6.2f} {at + seconds:6.2f} {seconds:6.2f} s  {name}" for name, at, seconds in line["start_spans"]]
    return "\n".join([*rows, f"         {line['first_step_done']:6.2f}           first step done"])


def summary(line: dict[str, Any]) -> str:
    parts = " ".join(f"{name} {seconds:.2f}" for name, seconds in line["seconds"].items())
    return f"{line['gpus']} GPU {line['model']} {line['size']} {line['pictures']} ({line['start']}): {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--models", nargs="+", default=["t2v-A14B", "i2v-A14B"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", nargs="+", default=["480p"], help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--pictures", nargs="+", default=list(PICTURES), choices=list(PICTURES))
    parser.add_argument("--guidance", nargs="+", default=["off"], choices=list(GUIDANCE))
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--text", default="given", choices=TEXTS, help="rows, or a prompt for umT5")
    parser.add_argument("--repeats", type=int, default=2, help="jobs of each combination in a group")
    parser.add_argument("--plain-read", type=int, default=8, help="GiB of an expert's files to time plain reads of")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of Parallel")
    parser.add_argument(
        "--changes", nargs="*", default=[], metavar="NAME=VALUE,...",
        help="of the last job: size, pictures, steps, guidance, settings of Parallel; each is taken back",
    )  # fmt: skip
    parser.add_argument("--pack", type=Path, default=ROOT, help="another checkout to measure, to compare with")
    parser.add_argument("--label", default="", help="what is measured, for the lines")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    mount_pack(arguments.pack.resolve())
    rates = {}
    for model in arguments.models:
        start = time.perf_counter()
        files = sorted((write_model(arguments.folder, model) / "high_noise_model").glob("*.safetensors"))
        written = time.perf_counter() - start
        threads = (1, READ_THREADS) if arguments.plain_read else ()
        rates[model] = {str(count): read_rate(files, count, arguments.plain_read) for count in threads}
        print(f"{model}: written in {written:.1f} s, plain reads in GB/s by threads: {rates[model]}", flush=True)
    seen: dict[Shape, Any] = {}
    for gpus in arguments.gpus:
        runner = Runner(arguments, gpus)
        try:
            jobs = [
                (another_seed(shape, seed), guidance, "")
                for shape, guidance in combinations(arguments, gpus)
                for seed in range(arguments.repeats)
            ]
            # None, where no combination can be on so many GPUs.
            for as_it_was in jobs[-1:]:
                for change in arguments.changes:
                    jobs += [changed(*as_it_was[:2], change), as_it_was]
            for shape, guidance, change in jobs:
                line, latents = runner.run(shape, guidance, change)
                line["plain_read_gb_per_s"] = rates[shape.model]
                line["latents_difference"] = difference(seen.setdefault(shape, latents), latents)
                append_results(line, arguments.results)
                print(summary(line), flush=True)
                if line["start"] == "cold":
                    print(start_table(line), flush=True)
        finally:
            runner.pool.release()


if __name__ == "__main__":
    main()
