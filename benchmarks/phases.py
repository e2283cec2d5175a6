"""When a job entered each of its phases, by the times of the file in which rank 0 reports them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL = 0.003


class Phases:
    """Watches the only job that runs under a folder, on a thread of its own. A context manager.

    Attributes:
        seen: phase -> seconds since the job was asked for; "step N" is when so many steps were done.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._stop = threading.Event()
        self._before = set(parent.glob("wan-job-*"))
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.time()
        self.seen: dict[str, float] = {}
        self.total = 0.0

    def __enter__(self) -> Phases:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.total = time.time() - self._start
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        folder: Path | None = None
        while not self._stop.wait(POLL):
            if folder is None or not folder.exists():
                folder = next(iter(set(self._parent.glob("wan-job-*")) - self._before), None)
                continue
            try:
                with (folder / "progress.json").open() as file:
                    written = os.fstat(file.fileno()).st_mtime_ns / 1e9
                    value = json.load(file)
            except (OSError, ValueError):
                continue
            name = value["phase"] if value["phase"] != "denoise" or not value["step"] else f"step {value['step']}"
            self.seen.setdefault(name, written - self._start)

    def start_spans(self, reported: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
        """Name, seconds since the job was asked for, and seconds of what its start consisted of, as it began.

        Args:
            reported: `spans` of result.json.
        """
        return sorted(
            ((name, round(start - self._start, 3), round(seconds, 3)) for name, start, seconds in reported),
            key=lambda span: span[1],
        )

    def spans(self, reported: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each part of the job, in order; they add up to its total.

        Args:
            reported: of result.json, for phases that were over before anybody looked.

        processes: until rank 0 lives. imports: until it has its libraries and the group has met. load: until the first
        step begins. first_step. steps: the others, with waiting for the second expert. decode: until the last frame is
        decoded. write: until the mp4 is whole. end: until the launcher has seen it.
        """
        marks = [
            ("processes", "start"), ("imports", "encode"), ("encode", "load"), ("load", "denoise"),
            ("first_step", "step 1"), ("steps", "decode"), ("decode", "write"), ("write", "done"),
        ]  # fmt: skip
        for name, after in (("encode", "load"), ("load", "denoise"), ("denoise", "decode")):
            if name in self.seen and after not in self.seen and name in reported:
                self.seen[after] = self.seen[name] + reported[name]
            if name not in self.seen and after in self.seen and name in reported:
                self.seen[name] = self.seen[after] - reported[name]
        spans, last = {}, 0.0
        for name, until in marks:
            if until in self.seen:
                spans[name], last = round(self.seen[until] - last, 3), self.seen[until]
        return spans | {"end": round(self.total - last, 3), "total": round(self.total, 3)}
