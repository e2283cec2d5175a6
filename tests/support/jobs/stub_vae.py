"""Takes the place of rank/worker.py in a copy of the pack: ranks without torch that decode for ComfyUI's nodes.

Each byte of the frames is 7. At the part `at` of fault.json rank 1 does what its action says. Not imported by tests.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from ..machine.memory_file import OpenedMemory

FAULT = json.loads((Path(__file__).parent / "fault.json").read_text())
PARTS = 4


def main(group, folder, files, session):  # type: ignore[no-untyped-def]
    rank, job = int(os.environ["RANK"]), folder.read_job()
    made = job.memory[1]
    memory = OpenedMemory(Path(folder.read_json(folder.pictures)["memory"])).map(made.stop)
    for part in range(1, PARTS + 1):
        files.progress("decode", part - 1, PARTS)
        if part == FAULT.get("at") and rank == 1:
            ACTIONS[FAULT["action"]]()
        # Real ones wait for one another.
        (folder.path / f"rank{rank}-{part}").touch()
        while not (folder.path / f"rank{1 - rank}-{part}").exists():
            time.sleep(0.01)
            if folder.stop.exists():
                return session
    if rank == 0:
        memory[made] = bytes([7]) * (made.stop - made.start)
        if FAULT["action"] != "no result":
            folder.write_json(folder.result, {"id": job.id, "version": job.version})
    return session


def fail() -> None:
    raise ValueError("the weights of layer 3 are bad")


def stuck_in_a_test() -> None:
    time.sleep(600)


def full() -> None:
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""

    __module__ = "torch"


ACTIONS = {"raise": fail, "hang": stuck_in_a_test, "full": full}
