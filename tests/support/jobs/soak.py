"""Many jobs in one ComfyUI, and what is counted of them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import rank_of
from safetensors import safe_open
from serving import INFERENCE, Comfy
from shared_memory import orphans
from wan_pack.demo.client import Run
from wan_pack.demo.example import Prompt, node_id, node_of
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.machine.processes import Process

LONG = {"sample_steps": 1000}
"""A job that samples until something happens to it."""
PHASE_TIMEOUT = 120.0
MORE_DESCRIPTORS, MORE_THREADS = 4, 6
"""What a server may gain by itself: open connections, the threads of its executor."""


@dataclass
class Soak:
    """Runs jobs and counts what came of them."""

    comfy: Comfy
    counts: Counter[str] = field(default_factory=Counter)
    latents: dict[int, set[str]] = field(default_factory=dict)
    """Seed -> digests of the latents it gave."""
    seconds: list[float] = field(default_factory=list)
    """Of each good job."""

    def prompt(self, seed: int, **inference: Any) -> Prompt:
        values = {"width": 64, "height": 48, "seed": seed, "on_error": "raise", **inference}
        prompt = self.comfy.example(**values)
        node_of(prompt, "WanVideoDistributedConfig")["inputs"]["keep_warm_seconds"] = 600
        keep = {"LoadWanVideoModel", "LoadWanVideoT5TextEncoder", "WanVideoTextEncode", "WanVideoDistributedConfig"}
        prompt = {key: node for key, node in prompt.items() if node["class_type"] in keep | {INFERENCE}}
        latents = {"samples": [node_id(prompt, INFERENCE), 4], "filename_prefix": "soak/latents"}
        prompt["soak"] = {"class_type": "SaveLatent", "inputs": latents}
        return prompt

    def good(self, seed: int) -> None:
        started = time.monotonic()
        run = self.comfy.run(self.prompt(seed))
        assert run.ending[0] == "execution_success", run.ending
        self.seconds.append(time.monotonic() - started)
        (saved,) = self.output.glob("soak/latents_*.latent")
        with safe_open(saved, "numpy") as file:
            digest = hashlib.sha256(file.get_tensor("latent_tensor").tobytes()).hexdigest()
        saved.unlink()
        self.latents.setdefault(seed, set()).add(digest)
        self.counts["good"] += 1

    def broken(self, seed: int, phase: str, act: Callable[[], Any], **inference: Any) -> str:
        """A job to which `act` happens in a phase. Its error."""
        with at_phase(self.jobs, phase, act):
            run = self.comfy.run(self.prompt(seed, **(inference or LONG)))
        return message(run)

    def processes(self) -> list[int]:
        return self.comfy.job_processes()

    def rank(self, number: int) -> Process:
        """Of the job that runs."""
        (folder,) = self.jobs.glob("wan-job-*")
        return rank_of(JobDir(folder), number)

    def agent(self) -> int:
        """The parent of the ranks of the job that runs."""
        return int(Path(f"/proc/{self.rank(0).pid}/stat").read_text().rpartition(")")[2].split()[1])

    def released(self) -> None:
        self.comfy.server.request("/wan_distributed/release", {})
        self.comfy.wait_until_idle()

    @property
    def jobs(self) -> Path:
        return self.comfy.server.base / "temp" / "wan_distributed"

    @property
    def output(self) -> Path:
        return self.comfy.server.base / "output"

    def state(self) -> dict[str, int]:
        """What could grow in the server, or be left over by it."""
        process = Path(f"/proc/{self.comfy.server.pid}")
        status = (process / "status").read_text()
        return {
            "descriptors": len(os.listdir(process / "fd")),
            "threads": len(os.listdir(process / "task")),
            "shared memory": len(orphans()),
            "job folders": len(list(self.jobs.iterdir())) if self.jobs.exists() else 0,
            "unfinished files": len(unfinished(self.output)),
            "resident MiB": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) >> 10,
        }


def message(run: Run) -> str:
    assert run.ending[0] == "execution_error", run.ending
    return run.ending[1]["exception_message"]


def unfinished(output: Path) -> list[Path]:
    """Hidden files, and videos without content."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return [path for path in files if path.name.startswith(".") or path.stat().st_size == 0]


@contextlib.contextmanager
def at_phase(jobs: Path, phase: str, act: Callable[[], Any]) -> Iterator[None]:
    """Acts once, on a thread, when a job that starts inside the block has rank 0 in this phase; fails if it has not."""
    before, over, problems = set(jobs.glob("wan-job-*")), threading.Event(), [f"the job was never in phase {phase}"]

    def watch() -> None:
        deadline = time.monotonic() + PHASE_TIMEOUT
        while not over.wait(0.002) and time.monotonic() < deadline:
            for folder in set(jobs.glob("wan-job-*")) - before:
                with contextlib.suppress(OSError):
                    if f'"{phase}"' in (folder / "rank0.alive").read_text():
                        problems.clear()
                        try:
                            act()
                        except BaseException as error:
                            problems.append(f"in phase {phase}: {error!r}")
                        return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not problems, problems


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mounts one there; needs the right to."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%dm" % mebibytes):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        yield
    finally:
        assert libc.umount2(os.fsencode(folder), 2) == 0


def can_mount(folder: Path) -> bool:
    try:
        with small_disk(folder, 1):
            return True
    except OSError as error:
        print(f"no full disks: {error}")
        return False
