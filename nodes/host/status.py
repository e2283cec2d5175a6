"""The text that tells the user what a run did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def with_warnings(line: str, warnings: Iterable[str]) -> str:
    """A node's last line, and what the user may have to change: a status that nothing is linked to is not seen."""
    return "\n".join([line, *(f"warning: {warning}" for warning in dict.fromkeys(warnings))])


class Status:
    """Collects what the user should know, and words it."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        """What the user may have to change."""
        self.notes: list[str] = []
        """What was done as asked, and would not be seen otherwise."""
        self.plan = ""
        """How the job was laid out, and why: lines of text."""

    def warn(self, *lines: str) -> None:
        """Adds lines that are not there yet: the job carries them and its result repeats them."""
        self.warnings += [line for line in dict.fromkeys(lines) if line not in self.warnings]

    def note(self, *lines: str) -> None:
        self.notes += [line for line in dict.fromkeys(lines) if line not in self.notes]

    def ending(self, info: Mapping[str, Any], seconds: float) -> str:
        """What the node shows at its end, from a job's result.json.

        Args:
            seconds: that have passed.
        """
        video = info["video"]
        made = f"{video['frames']} frames, {video['fps']:g} fps" if video else "latents, no video"
        return with_warnings(f"done in {seconds:.0f} s: {made}", self.warnings)

    def block(self, path: Path | None, info: Mapping[str, Any], seconds: float) -> str:
        """The readable status of a finished run: plain text that ComfyUI's text preview shows as a list.

        Args:
            path: of the video; None if none was made.
            info: the job's result.json.
            seconds: that have passed, more than its phases have taken.
        """
        steps, phases = info["step_seconds"], info["phases"]
        around = {"processes and files": seconds - sum(phases.values())}
        times = ", ".join(f"{what} {took:.1f}" for what, took in {**around, **phases}.items())
        lines = ["success", *self._made(path, info), f"- time: {seconds:.1f} s ({times})"]
        if steps:
            lines.append(f"- step: {sum(steps) / len(steps):.2f} s, mean of {len(steps)}")
        for name, key in (("GPU memory", "peak_gpu_bytes"), ("host memory", "peak_rss_bytes")):
            if any(info[key]):
                sizes = ", ".join(f"{size / 2**30:.2f} GiB" for size in info[key])
                lines.append(f"- peak {name} per process: {sizes}")
        if self.plan:
            first, *rest = self.plan.splitlines()
            lines += [f"- {first}", *(f"  - {line}" for line in rest)]
        lines += ["- settings:", *(f"  - {name}: {value}" for name, value in info["settings"].items())]
        for heading, said in (("notes", self.notes), ("warnings", self.warnings)):
            if said:
                lines += [f"- {heading}:", *(f"  - {line}" for line in said)]
        return "\n".join(lines)

    def _made(self, path: Path | None, info: Mapping[str, Any]) -> list[str]:
        video = info["video"]
        if path is None or video is None:
            return [f"- latents: {info['latents']['shape']}, no video (decode_video is off)"]
        return [
            f"- video: {path}",
            f"- size: {video['width']}x{video['height']}, {video['frames']} frames, {video['fps']:g} fps",
        ]
