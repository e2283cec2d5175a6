"""Many jobs in one ComfyUI, some of them with a fault: nothing is left behind and every good video is right.

`make soak` runs it long (SOAK_JOBS=300), with every fault of soak_faults.py; without that, a sample of the quick ones.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from serving import Comfy
from soak import MORE_DESCRIPTORS, MORE_THREADS, Soak, can_mount
from soak_faults import FAULTS

JOBS = int(os.environ.get("SOAK_JOBS", "12"))
LONG = JOBS >= 100
FAULT_EVERY = int(os.environ.get("SOAK_EVERY", "10" if LONG else "3"))
ONLY = os.environ.get("SOAK_FAULTS", "")
"""Part of the names of those that are wanted; empty for all."""
SEEDS = (1, 2, 3)
"""In turns: a prompt that equals the one before would come from ComfyUI's cache."""


def faults(folder: Path) -> list[str]:
    """Those that this run mixes in, and this user may."""
    mounts = can_mount(folder)
    return [
        name
        for name, fault in FAULTS.items()
        if (mounts or not fault.mounts) and (ONLY in name if ONLY else LONG or fault.quick)
    ]


def test_many_jobs_with_faults_leave_nothing_behind(comfy: Comfy, tmp_path: Path) -> None:
    rng, soak, names = random.Random(0), Soak(comfy), faults(tmp_path / "disk")
    for seed in SEEDS:
        soak.good(seed)
    soak.released()
    before, started = soak.state(), time.monotonic()
    todo: list[str] = []
    for number in range(1, JOBS + 1):
        seed = SEEDS[number % len(SEEDS)]
        if number % FAULT_EVERY:
            soak.good(seed)
        else:
            # Each kind as often as the others, in an order of its own.
            todo = todo or rng.sample(names, len(names))
            name, since = todo.pop(), time.monotonic()
            FAULTS[name].run(soak, seed)
            soak.counts[name] += 1
            print(f"job {number}, {name}: {time.monotonic() - since:.1f} s", flush=True)
    soak.released()
    after, good = soak.state(), sorted(soak.seconds[len(SEEDS) :])
    print(f"\n{dict(soak.counts)} in {time.monotonic() - started:.0f} s; a good job {good[len(good) // 2]:.2f} s")
    print(f"before {before}\nafter  {after}")
    assert [len(digests) for digests in soak.latents.values()] == [1] * len(SEEDS), "equal seeds, equal latents"
    assert len(set.union(*soak.latents.values())) == len(SEEDS)
    assert comfy.job_processes() == []
    assert after["job folders"] == 0
    assert after["unfinished files"] == 0
    assert after["shared memory"] <= before["shared memory"]
    assert after["descriptors"] <= before["descriptors"] + MORE_DESCRIPTORS
    assert after["threads"] <= before["threads"] + MORE_THREADS
