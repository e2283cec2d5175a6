"""Many jobs in one ComfyUI, some of them with a fault: nothing is left behind and every good video is right.

`make soak` runs it long (SOAK_JOBS=300).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from serving import INFERENCE, Comfy, at_first_step
from wan_pack.demo.client import Run
from wan_pack.demo.example import Prompt, node_id, node_of

JOBS = int(os.environ.get("SOAK_JOBS", "12"))
FAULT_EVERY = 10 if JOBS >= 100 else 3
SEEDS = (1, 2, 3)
"""In turns: a prompt that equals the one before would come from ComfyUI's cache."""
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
        (saved,) = (self.comfy.server.base / "output" / "soak").glob("latents_*.latent")
        with safe_open(saved, "numpy") as file:
            digest = hashlib.sha256(file.get_tensor("latent_tensor").tobytes()).hexdigest()
        saved.unlink()
        self.latents.setdefault(seed, set()).add(digest)
        self.counts["good"] += 1

    def fault(self, name: str, seed: int) -> None:
        FAULTS[name](self, seed)
        self.counts[name] += 1

    def processes(self) -> list[int]:
        return self.comfy.job_processes()

    def released(self) -> None:
        self.comfy.server.request("/wan_distributed/release", {})
        self.comfy.wait_until_idle()


def message(run: Run) -> str:
    assert run.ending[0] == "execution_error", run.ending
    return run.ending[1]["exception_message"]


def kill_a_rank(soak: Soak, seed: int) -> None:
    def kill(run: Run) -> None:
        # The agent's pid is the lowest.
        os.kill(max(soak.processes()), signal.SIGKILL)

    run = soak.comfy.run(soak.prompt(seed, sample_steps=1000), at_first_step(kill))
    assert re.match(r"rank \d was killed by SIGKILL", message(run)), message(run)


def cancel(soak: Soak, seed: int) -> None:
    def press(run: Run) -> None:
        soak.comfy.server.request("/interrupt", {"prompt_id": run.prompt_id})

    run = soak.comfy.run(soak.prompt(seed, sample_steps=1000), at_first_step(press))
    assert run.ending[0] == "execution_interrupted", run.ending


def kill_an_idle_process(soak: Soak, seed: int) -> None:
    """Nobody is told: the next job starts other processes."""
    for pid in soak.processes()[:1]:
        os.kill(pid, signal.SIGKILL)
    soak.good(seed)


def damage_a_file(soak: Soak, seed: int) -> None:
    damaged = soak.comfy.server.base / "models" / "vae" / "damaged.safetensors"
    good = soak.comfy.server.base / "models" / "vae" / soak.comfy.model.vae
    damaged.write_bytes(good.read_bytes()[:5000])
    prompt = soak.prompt(seed)
    node_of(prompt, "LoadWanVideoModel")["inputs"]["vae"] = damaged.name
    try:
        assert damaged.name in message(soak.comfy.run(prompt))
    finally:
        damaged.unlink()


def fill_the_disk(soak: Soak, seed: int) -> None:
    """The folder of the jobs lies on a file system of 1 MiB meanwhile."""
    soak.released()
    with tiny_disk(soak.comfy.server.base / "temp" / "wan_distributed"):
        assert "MiB free; the job needs" in message(soak.comfy.run(soak.prompt(seed)))


@contextlib.contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """Mounts one there; needs the right to."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=1m"):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        yield
    finally:
        assert libc.umount2(os.fsencode(folder), 2) == 0


FAULTS: dict[str, Callable[[Soak, int], None]] = {
    "rank killed": kill_a_rank,
    "cancelled": cancel,
    "idle process killed": kill_an_idle_process,
    "damaged file": damage_a_file,
}


def possible_faults(folder: Path) -> list[str]:
    """All of them, and a full disk where this user may mount one."""
    folder.mkdir()
    try:
        with tiny_disk(folder):
            FAULTS["full disk"] = fill_the_disk
    except OSError as error:
        print(f"no full disk: {error}")
    return list(FAULTS)


def state(comfy: Comfy) -> dict[str, int]:
    """What could grow in the server."""
    process = Path(f"/proc/{comfy.server.pid}")
    status = (process / "status").read_text()
    return {
        "descriptors": len(os.listdir(process / "fd")),
        "threads": len(os.listdir(process / "task")),
        "shared memory": len(os.listdir("/dev/shm")),
        "job folders": len(list((comfy.server.base / "temp" / "wan_distributed").iterdir())),
        "resident MiB": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) >> 10,
    }


def test_many_jobs_with_faults_leave_nothing_behind(comfy: Comfy, tmp_path: Path) -> None:
    rng, soak, faults = random.Random(0), Soak(comfy), possible_faults(tmp_path / "disk")
    for seed in SEEDS:
        soak.good(seed)
    soak.released()
    before, started = state(comfy), time.monotonic()
    todo: list[str] = []
    for number in range(1, JOBS + 1):
        seed = SEEDS[number % len(SEEDS)]
        if number % FAULT_EVERY:
            soak.good(seed)
        else:
            # Each kind as often as the others, in an order of its own.
            todo = todo or rng.sample(faults, len(faults))
            soak.fault(todo.pop(), seed)
    soak.released()
    after, good = state(comfy), sorted(soak.seconds[len(SEEDS) :])
    print(f"\n{dict(soak.counts)} in {time.monotonic() - started:.0f} s; a good job {good[len(good) // 2]:.2f} s")
    print(f"before {before}\nafter  {after}")
    assert [len(digests) for digests in soak.latents.values()] == [1] * len(SEEDS), "equal seeds, equal latents"
    assert len(set.union(*soak.latents.values())) == len(SEEDS)
    assert comfy.job_processes() == []
    assert after["job folders"] == 0
    assert after["shared memory"] <= before["shared memory"]
    assert after["descriptors"] <= before["descriptors"] + MORE_DESCRIPTORS
    assert after["threads"] <= before["threads"] + MORE_THREADS
