"""Every switch once: what it does to the result, the time and the memory, or why it does not run here.

    python benchmarks/every_switch.py --folder /scratch/wan

Jobs of one small model (Wan2.1 T2V-1.3B) that differ in one setting from the first, in processes of their own; then the
doctor. Prints a table and appends a JSON line for each to benchmarks/results.jsonl. Cases run side by side, each on
GPUs of its own. On a machine without a GPU, with `--model tiny`, the same runs on CPU processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pack import RESULTS, ROOT, append_results, mount_pack
from random_models import write_model
from real_jobs import Shape, difference, make_inputs, make_job, moved
from side_by_side import run_side_by_side

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("switch", "gpus", "first_step", "seconds_per_step", "peak_gpu_gib", "difference", "what")
PLAIN, GUIDED = "plain", "guided"
"""The cases that the others are compared with."""
DOCTOR_TIMEOUT = 120


class Case(NamedTuple):
    name: str
    gpus: int = 1
    guided: bool = False
    settings: dict[str, Any] = {}  # noqa: RUF012


def cases() -> list[Case]:
    """The two references first; then one for each switch, those that cannot run here included."""
    from wan_pack.wan.model.attention_kernels import KERNELS

    return [
        Case(PLAIN),
        Case(GUIDED, guided=True),
        *(Case(f"attention {name}", settings={"attention": name}) for name in KERNELS),
        Case("preview", settings={"preview": True}),
        Case("stream_blocks", settings={"stream_blocks": True}),
        Case("stream_blocks, guided", guided=True, settings={"stream_blocks": True}),
        Case("offload_model", settings={"offload_model": True}),
        Case("memory_optimization", settings={"memory_optimization": True}),
        Case("stream_blocks, memory_optimization", settings={"stream_blocks": True, "memory_optimization": True}),
        Case("torch_compile", settings={"torch_compile": True}),
        Case("kernels plain", settings={"kernels": "plain"}),
        Case("kernels triton", settings={"kernels": "triton"}),
        Case("linear_precision fp8", settings={"linear_precision": "fp8"}),
        Case("mixed_precision fp16", settings={"mixed_precision": "fp16"}),
        Case("Ulysses", 2),
        Case("Ulysses, symmetric", 2, settings={"ulysses_engine": "symmetric"}),
        Case("Ulysses, deepspeed", 2, settings={"ulysses_engine": "deepspeed"}),
        Case("Ulysses, stream_blocks", 2, settings={"stream_blocks": True}),
        Case("Ulysses, preview", 2, settings={"preview": True}),
        Case("FSDP, one block", 2, settings={"use_fsdp": True}),
        Case("FSDP, one expert", 2, settings={"use_fsdp": True, "gather": "expert"}),
        Case("Ulysses, guided", 2, guided=True),
        Case("CFG parallel", 2, guided=True, settings={"cfg_parallel": True}),
        Case("CFG parallel x Ulysses", 4, guided=True, settings={"cfg_parallel": True}),
        Case("CFG parallel, FSDP", 2, guided=True, settings={"cfg_parallel": True, "use_fsdp": True}),
    ]


class Measurement:
    """Of all cases."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.lines: list[dict[str, Any]] = []
        self.latents: dict[str, tuple[bool, Tensor]] = {}
        self._lock = threading.Lock()

    def run(self, case: Case, ids: list[str]) -> None:
        line: dict[str, Any] = {
            "benchmark": "switches", "switch": case.name, "model": self.arguments.model, "gpus": case.gpus,
            "size": self.arguments.size, "steps": self.arguments.steps,
            "command": " ".join(["python", "benchmarks/every_switch.py", *sys.argv[1:]]),
        }  # fmt: skip
        try:
            self._measure(case, ids, line)
        # What cannot run here, or fails, is what this is to find out.
        except Exception as error:
            line["what"] = f"{type(error).__name__}: {error}".splitlines()[0]
        with self._lock:
            self.lines.append(line)
        print(f"{case.name}: {line.get('what', 'ran')}", flush=True)

    def _measure(self, case: Case, ids: list[str], line: dict[str, Any]) -> None:
        from safetensors.torch import save_file
        from wan_pack.distributed.launch.launcher import run_job

        folder = self.arguments.folder
        shape = Shape(self.arguments.model, self.arguments.size, self.arguments.steps, guided=case.guided)
        job = make_job(folder, shape, tuple(ids), case.gpus, **case.settings)
        pictures: list[int] = []

        def on_progress(progress: Any) -> None:
            if progress.preview is not None:
                pictures.append(len(progress.preview))

        start = time.monotonic()
        result = run_job(
            job, lambda path: save_file(make_inputs(shape), path), on_progress=on_progress,
            parent=folder / "jobs" / f"switches-{'-'.join(ids)}", failed=folder / "failed",
        )  # fmt: skip
        info, total = result.info, time.monotonic() - start
        steps, settings = info["step_seconds"], info["settings"]
        latents = moved(result.folder.latents, shape)
        result.remove()
        with self._lock:
            self.latents[case.name] = case.guided, latents
        said = [f"ran, {total:.1f} s in all", settings["attention"].partition(" ")[0], f"{settings['kernels']} kernels"]
        if case.settings.get("preview"):
            said.append(f"{len(pictures)} pictures of {sum(pictures) // max(len(pictures), 1)} bytes")
        line |= {
            "first_step": round(steps[0], 3), "seconds_per_step": round(min(steps[1:] or steps), 4),
            "peak_gpu_gib": round(max(info["peak_gpu_bytes"]) / 2**30, 2), "what": ", ".join(said),
            "settings": settings,
        }  # fmt: skip

    def compare(self) -> None:
        """Adds how far each case is from its reference, and keeps the lines."""
        for line in self.lines:
            guided, latents = self.latents.get(line["switch"], (False, None))
            reference = self.latents.get(GUIDED if guided else PLAIN)
            if latents is not None and reference is not None:
                line["difference"] = f"{difference(reference[1], latents):.1e}"
            append_results(line, self.arguments.results)


def doctor(model: Path) -> str:
    """What it prints."""
    command = [sys.executable, str(ROOT / "distributed"), "doctor", "--model", str(model)]
    start = time.monotonic()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"the doctor did not end within {DOCTOR_TIMEOUT} s"
    return f"{ended.stdout}{ended.stderr}exit code {ended.returncode} after {time.monotonic() - start:.1f} s"


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(str(line.get(name, "")) for name in COLUMNS) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random weights and the jobs go")
    parser.add_argument("--model", default="t2v-1.3B", help="a name in wan/model/config.py, or tiny")
    parser.add_argument("--size", default="832x480x33", help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names hold one of these")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    mount_pack()
    model = write_model(arguments.folder, arguments.model)
    measurement = Measurement(arguments)
    chosen = [case for case in cases() if any(part in case.name for part in [PLAIN, GUIDED, *arguments.only])]
    run_side_by_side(chosen, lambda case: case.gpus, measurement.run)
    measurement.compare()
    print(doctor(model / "high_noise_model"), flush=True)
    print(table(measurement.lines))


if __name__ == "__main__":
    main()
