"""`doctor`: whether this machine can make videos, how well, and what to do if not.

Never hangs: each probe has its own deadline, and one that does not answer is a line of the report. What needs torch, a
GPU or another process's patience is asked in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..group import installation
from ..group.environment import child_environment
from ..job.job import Parallel
from ..machine.gpus import list_gpus
from ..machine.programs import END_SECONDS
from . import exchange
from .findings import WRONG, Finding, Report, shortened
from .gpu_findings import driver_findings, exchange_findings, gpu_findings
from .system import (  # fmt: skip
    disk_findings,
    ffmpeg_findings,
    folder_findings,
    memory_findings,
    package_findings,
    variable_findings,
    version_findings,
)

LIBRARIES_TIMEOUT = 120.0
"""Seconds to import torch and the attention kernels, and to read the model's headers."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One question to the machine."""

    topic: str
    ask: Callable[[], Sequence[Finding]]
    deadline: float
    """Seconds."""


@dataclass(slots=True)
class _Answer:
    findings: list[Finding] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


def probes(
    *, folder: str, model: Sequence[Path] = (), output: Path | None = None, temp: Path | None = None
) -> list[Probe]:
    """All of them, in the order of the report.

    Args:
        folder: the name of the pack's.
        model: the file, the folder or all shards of a transformer; empty for none.
        output: where videos go; None for the current folder.
        temp: where jobs live; None for the system's.
    """
    folders = {"output": output or Path.cwd(), "temp": temp or Path(tempfile.gettempdir())}
    # Of the two it is the longest; each cure is one more try.
    tries = (exchange.START_TIMEOUT + exchange.TIMEOUT) * (1 + len(exchange.CURES)) + 30
    return [
        Probe("versions", version_findings, 20),
        Probe("imports", package_findings, installation.TIMEOUT + 10),
        Probe("driver", driver_findings, 15),
        Probe("GPUs", gpu_findings, 60),
        Probe("libraries", functools.partial(library_findings, model), LIBRARIES_TIMEOUT + 10),
        Probe("exchange", exchange_findings, tries),
        Probe("ffmpeg", ffmpeg_findings, 45),
        *(Probe(name, functools.partial(disk_findings, {name: path}), 10) for name, path in folders.items()),
        Probe("memory", lambda: memory_findings(len(list_gpus())), 15),
        Probe("environment", variable_findings, 5),
        Probe("folder", functools.partial(folder_findings, folder), 5),
    ]


def examine(asked: Sequence[Probe]) -> Report:
    """Asks all at once and waits for each until its deadline."""
    started = time.monotonic()
    answers = [_start(probe) for probe in asked]
    findings: list[Finding] = []
    for probe, answer in zip(asked, answers, strict=True):
        if answer.done.wait(max(started + probe.deadline - time.monotonic(), 0)):
            findings += answer.findings
        else:
            remedy = "A driver or a network disk may hang: look at dmesg"
            findings.append(Finding(probe.topic, f"no answer within {probe.deadline:g} s", WRONG, remedy))
    return Report(shortened(findings))


def _start(probe: Probe) -> _Answer:
    answer = _Answer()

    def ask() -> None:
        try:
            answer.findings = list(probe.ask())
        # A probe that fails says something of the machine, and must not cost the others' answers.
        except Exception as error:
            answer.findings = [Finding(probe.topic, f"could not be asked: {type(error).__name__}: {error}", WRONG)]
        answer.done.set()

    # A daemon: what waits inside the system for a dead disk or driver must not keep the report.
    threading.Thread(target=ask, name=f"doctor-{probe.topic}", daemon=True).start()
    return answer


def library_findings(model: Sequence[Path]) -> list[Finding]:
    """What libraries.py says, as far as it got."""
    # Absolute: the process works elsewhere.
    arguments = [str(path.absolute()) for path in model]
    command = [sys.executable, "-u", str(Path(__file__).resolve().parent.parent), "libraries", *arguments]
    with (
        tempfile.TemporaryDirectory(prefix="wan-doctor-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        environment = child_environment(Parallel(gpu_count=1), Path(folder))
        # What torch makes of all GPUs: those that the user hides are no fault of it.
        del environment["CUDA_VISIBLE_DEVICES"]
        # Into files: a pipe stays open for as long as anything that the libraries have started.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
            cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code, late = process.wait(LIBRARIES_TIMEOUT), False
        except subprocess.TimeoutExpired:
            code, late = 0, True
        finally:
            process.kill()
            # One that waits inside a driver goes when the driver lets it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        out.seek(0)
        errors.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
        said = errors.read()[-500:].decode(errors="replace").strip()
    found = [Finding(**json.loads(line)) for line in lines if line.startswith("{")]
    after = f" after {found[-1].topic}" if found else ""
    if late:
        text = f"torch and the attention kernels were not imported within {LIBRARIES_TIMEOUT:g} s{after}"
        found.append(Finding("libraries", text, WRONG, "Look at the disk that they are on, and at the driver"))
    elif code:
        found.append(Finding("libraries", f"the process that imports them ended with {code}{after}: {said}", WRONG))
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints the report. Returns the exit code: 0, or 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="distributed doctor", description="Says whether this machine can make videos."
    )
    parser.add_argument("--model", type=Path, nargs="+", default=(), help="file, folder or shards of a transformer")
    parser.add_argument("--output", type=Path, help="folder for videos (default: this one)")
    parser.add_argument("--temp", type=Path, help="folder where jobs live (default: the system's)")
    # As it was typed: ComfyUI goes by the name of a link.
    own = Path(sys.argv[0]).absolute().parent.name
    parser.add_argument("--pack-folder", default=own, help="the pack's folder in custom_nodes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    options = parser.parse_args(arguments)
    report = examine(probes(folder=options.pack_folder, model=options.model, output=options.output, temp=options.temp))
    print(json.dumps(report.data(), indent=2) if options.json else report.text(), flush=True)
    return 0 if report.healthy else 1
