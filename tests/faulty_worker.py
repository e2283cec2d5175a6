"""Takes the place of distributed/worker.py in a copy of the pack: the real worker, with one fault.

The fault is in fault.json beside it. Not imported by tests.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import torch

from . import experts, real_worker
from . import session as session_module  # type: ignore[attr-defined]

FAULT = json.loads((Path(__file__).parent / "fault.json").read_text())
NAMES = sorted(os.environ)


def stuck_in_a_test() -> None:
    time.sleep(600)


def strike(worker: real_worker.Worker) -> None:
    action = FAULT["action"]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise ValueError("the weights of layer 3 are bad")
    elif action == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 79.10 GiB in all")
    elif action == "sleep":
        stuck_in_a_test()
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "ignore_term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stuck_in_a_test()
    elif action == "return":
        os._exit(0)
    elif action == "child":
        subprocess.Popen(["sleep", "600"])
        stuck_in_a_test()
    elif action == "environment":
        (worker.folder.path / "environment.json").write_text(json.dumps(dict(os.environ)))
        raise ValueError(f"names: {NAMES}")
    elif action == "wait":
        time.sleep(1.5)


def main(group, folder, files, session):  # type: ignore[no-untyped-def]
    rank = int(os.environ["RANK"])
    original = real_worker.Worker.on_step
    if FAULT["action"] == "fingerprint" and rank == FAULT["rank"]:
        draw = real_worker.draw_noise
        real_worker.draw_noise = lambda shape, seed: draw(shape, seed + 1)
    if FAULT["action"] == "memory" and rank == FAULT["rank"]:

        def load(*args, **kwargs):  # type: ignore[no-untyped-def]
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
            return [bytearray(16 << 20) for _ in range(100)]

        session_module.load_expert = load

    if FAULT["action"] == "disk" and rank == FAULT["rank"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, 4 << 10))

    def on_step(self, done):  # type: ignore[no-untyped-def]
        original(self, done)
        if self.rank == FAULT["rank"] and done == FAULT["step"] + 1:
            strike(self)

    real_worker.Worker.on_step = on_step
    assert experts is not None
    return real_worker.main(group, folder, files, session)
