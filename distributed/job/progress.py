"""What the user sees of a running job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from .job import JobError
from .job_folder import JobDir

SHARES = {"start": 0.02, "encode": 0.03, "load": 0.15, "denoise": 0.65, "decode": 0.14, "write": 0.01, "done": 0.0}
"""Part of the progress bar that each phase gets, in order."""
WORDS = {
    "start": "starting",
    "encode": "encoding",
    "load": "loading",
    "denoise": "sampling",
    "decode": "decoding",
    "write": "writing the video",
    "done": "finishing",
}


Span = Callable[[str], AbstractContextManager[object]]
"""Measures what is done within, by the name that it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """progress.json."""

    phase: str
    step: int = 0
    total: int = 0
    """0: unknown."""
    seconds_per_step: float | None = None
    message: str = ""
    """More than the phase's name says; where nothing is counted, instead of it."""
    usage: str = ""
    """What the job's GPUs or processes use now, one line."""
    preview: bytes | None = None
    """JPEG of what the video is going to be, where there is a new one."""

    @property
    def fraction(self) -> float:
        """Of the whole job, 0 to 1."""
        done = 0.0
        for phase, share in SHARES.items():
            if phase == self.phase:
                return min(1.0, done + share * (min(self.step / self.total, 1.0) if self.total > 0 else 0.0))
            done += share
        return 0.0

    @property
    def text(self) -> str:
        """One line: "sampling 4/40 - 12.3 s/it - ETA 7:23"."""
        if self.message and self.total <= 0:
            return self.message
        parts = [WORDS.get(self.phase, self.phase)]
        if self.total > 0:
            parts[0] += f" {self.step}/{self.total}"
        if self.message:
            parts.append(self.message)
        if self.seconds_per_step is not None:
            left = round((self.total - self.step) * self.seconds_per_step)
            hours, minutes = divmod(left // 60, 60)
            eta = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
            parts += [f"{self.seconds_per_step:.2f} s/it", f"ETA {eta}"]
        return " - ".join(parts)


def place(phase: str, step: int) -> str:
    """Where a rank is: "denoise at step 3"; "load" while it has made no step."""
    return phase + (f" at step {step}" if step else "")


def steady_seconds(step_seconds: Sequence[float]) -> float:
    """Mean seconds per step. The first step also compiles and warms up; it says little about the others."""
    steady = step_seconds[1:] or step_seconds
    return sum(steady) / len(steady)


def read_progress(folder: JobDir) -> Progress | None:
    """None until the first rank has started, or while the file is not to be made sense of."""
    try:
        value = folder.read_json(folder.progress)
        seconds = value.get("seconds_per_step")
        return Progress(
            phase=str(value["phase"]),
            step=int(value["step"]),
            total=int(value["total"]),
            seconds_per_step=None if seconds is None else float(seconds),
            message=str(value.get("message", "")),
        )
    except (JobError, LookupError, TypeError, ValueError):
        return None
