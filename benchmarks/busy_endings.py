"""How soon jobs of a real ComfyUI end, on an idle machine and on a busy one: a row for each way, medians and maxima.

Part of endings.py (`--server N`), on the tiny model: what is measured is the ending, not the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busy import busy
from real_size import ROOT

LOADS = (0, 4)
"""Busy processes per core."""
WAIT = 0.3
"""Seconds, at least, between the begin of the load and what ends the job."""
LOOK = 0.005
LIMIT = 180.0

Words = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way in which a job ends.

    `when`: the phase of rank 0 in which it does; "queued" and "agent" are before there is a rank.
    `act`: gets the trial.
    """

    when: str
    act: Callable[[Trial], Any]
    values: Words = field(default_factory=dict)
    """Inputs of the node."""
    batch: bool = False
    warm: bool = False


class Trial:
    """One job of a server, and the end that it is given."""

    def __init__(self, server: Any, model: Any, load: Any, seed: int) -> None:
        self.server, self.model, self.load, self.seed = server, model, load, seed
        self.jobs = server.base / "temp" / "wan_distributed"
        self.prompt_id = ""
        self.acted = self.gone = 0.0

    def prompt(self, way: Way, **values: Any) -> Words:
        from wan_pack.demo.example import BATCH, TEXT_TO_VIDEO, node_of, small_example

        values = {"sample_steps": 1000, "num_frames": 17, "seed": self.seed, **way.values, **values}
        prompt = small_example(self.model, BATCH if way.batch else TEXT_TO_VIDEO, **values)
        node_of(prompt, "WanVideoDistributedConfig")["inputs"]["keep_warm_seconds"] = 600 if way.warm else 0
        return prompt

    def run(self, way: Way) -> dict[str, float]:
        """Seconds until ComfyUI says that the run has ended, where it still can, and until every process is gone."""
        from wan_pack.demo.client import run_prompt

        if way.warm:
            asyncio.run(run_prompt(self.server.url, self.prompt(way, sample_steps=1, num_frames=5, seed=self.seed + 1)))
        watcher = threading.Thread(target=self._watch, args=(way,))

        def on_event(run: Any, kind: str, data: Words) -> None:
            if not self.prompt_id:
                self.prompt_id = run.prompt_id
                watcher.start()

        ended = 0.0
        with contextlib.suppress(ConnectionError):
            asyncio.run(run_prompt(self.server.url, self.prompt(way), on_event=on_event, timeout=2 * LIMIT))
            ended = time.monotonic()
        watcher.join()
        self.load.off()
        if not self.acted:
            raise RuntimeError(f"the job was never at {way.when!r}")
        times = {"gone": self.gone - self.acted}
        return times | ({"ended": ended - self.acted} if ended else {})

    def _watch(self, way: Way) -> None:
        from wan_pack.distributed.machine.processes import Process

        # These pass too quickly to begin with the load in them.
        early = way.when in ("queued", "agent", "load")
        if early:
            self.load.on()
            time.sleep(WAIT)
        _wait(lambda: self._is_at(way.when))
        if not early:
            self.load.on()
            time.sleep(WAIT)
        processes = [process for pid in self.pids() if (process := Process.of(pid)) is not None]
        self.acted = self.gone = time.monotonic()
        way.act(self)
        # Those that were there, then all: to list every process all the time would be a load of its own.
        while processes:
            _wait(lambda seen=tuple(processes): not any(process.alive() for process in seen))
            self.gone = time.monotonic()
            processes = [process for pid in self.pids() if (process := Process.of(pid)) is not None]

    def _is_at(self, when: str) -> bool:
        if when == "queued":
            return True
        if when == "agent":
            return bool(list(self.jobs.glob("wan-group-*/owner.lock"))) and bool(self.pids("agent"))
        phases = [_phase(path) for path in self.jobs.glob("wan-job-*/rank0.alive")]
        wanted = 2 if when == "denoise, twice" else 1
        return phases.count(when.partition(",")[0]) == wanted

    def pids(self, *words: str) -> list[int]:
        """Of processes of this server's jobs; those that were started with `words`, or all."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes()
                    if os.fsencode(self.jobs) in command and all(os.fsencode(word) in command for word in words):
                        found.append(int(entry.name))
        return sorted(found)

    def cancel(self) -> None:
        self.server.request("/interrupt", {"prompt_id": self.prompt_id}, timeout=LIMIT)

    def kill(self, *words: str) -> None:
        os.kill(self.pids(*words)[-1], signal.SIGKILL)

    def kill_server(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"not within {LIMIT:g} s")
        time.sleep(LOOK)


def _phase(alive: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(alive.read_text())["phase"]
    return ""


LONG_DECODING = {"sample_steps": 1, "num_frames": 201}
WAYS = {
    "cancel, before the job starts": Way("queued", Trial.cancel),
    "cancel, processes starting": Way("agent", Trial.cancel),
    "cancel, loading": Way("load", Trial.cancel),
    "cancel, sampling": Way("denoise", Trial.cancel),
    "cancel, decoding": Way("decode", Trial.cancel, LONG_DECODING),
    "cancel, sampling, warm": Way("denoise", Trial.cancel, warm=True),
    "cancel, batch of two": Way("denoise, twice", Trial.cancel, batch=True),
    "a rank killed": Way("denoise", lambda trial: trial.kill("worker")),
    "the agent killed": Way("denoise", lambda trial: trial.kill("agent")),
    "ffmpeg killed": Way("decode", lambda trial: trial.kill("ffmpeg"), LONG_DECODING),
    "ComfyUI killed": Way("denoise", Trial.kill_server),
}


@contextlib.contextmanager
def _server(base: Path) -> Iterator[Any]:
    from wan_pack.demo.comfyui import Server

    server = Server(base, pack=ROOT)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def measure(ways: Sequence[str], times: int, append: Callable[[Words], None]) -> None:
    """Each way `times` times at each load; a line for each of them."""
    from wan_pack.demo.tiny_model import write_comfyui_files

    seed = 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = Path(folder)
        model = write_comfyui_files(base / "models")
        server = stack.enter_context(_server(base))
        for name in ways:
            for per_core in LOADS:
                seen: dict[str, list[float]] = {"ended": [], "gone": []}
                for _ in range(times):
                    with busy(per_core) as load:
                        seed += 2
                        for kind, seconds in Trial(server, model, load, seed).run(WAYS[name]).items():
                            seen[kind].append(round(seconds, 2))
                    if WAYS[name].act is Trial.kill_server:
                        server.stop()
                        server.start()
                line = {"benchmark": "busy_endings", "way": name, "per_core": per_core, "cores": os.cpu_count()}
                append({**line, **seen, "load_average": round(os.getloadavg()[0], 1)})


def table(lines: Sequence[Words]) -> str:
    """Markdown, of the last line for each way and load."""
    last = {(line["way"], line["per_core"]): line for line in lines if line["benchmark"] == "busy_endings"}
    head = ["how the job ends", "times"]
    for load in LOADS:
        where = f"{load} busy per core" if load else "idle"
        head += [f"{where}: processes gone", f"{where}: run ended"]
    rows = [head, ["---"] * len(head)]
    for way in dict.fromkeys(way for way, _ in last):
        found = [last.get((way, load)) for load in LOADS]
        cells = [_words(line[kind]) if line else "" for line in found for kind in ("gone", "ended")]
        rows.append([way, str(max(len(line["gone"]) for line in found if line)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} / {max(seconds):.2f}" if seconds else "-"


def ways_like(pattern: str) -> list[str]:
    """Names of the ways that a regular expression is found in."""
    return [name for name in WAYS if re.search(pattern, name)]
