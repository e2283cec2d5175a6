"""Takes the place of distributed/worker.py in a copy of the pack: ranks without torch, which do what fault.json says.

Not imported by tests. Standard library only, so that a real agent with two such ranks is up in the time torch takes to
import once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FAULT = json.loads((Path(__file__).parent / "fault.json").read_text())
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def stand_still() -> None:
    time.sleep(600)


def main(group, folder, files, session):  # type: ignore[no-untyped-def]
    rank = int(os.environ["RANK"])
    other = folder.path / f"rank{1 - rank}.ready"
    files.progress("load", 0, 0)
    action = FAULT["action"]
    if action == "child" and rank == 1:
        # In a session of its own and deaf to SIGTERM: a compiler, or a helper of a library.
        child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True, stdin=subprocess.DEVNULL)
        (folder.path / "child.pid").write_text(str(child.pid))
    (folder.path / f"rank{rank}.ready").touch()
    wait_for(other)
    files.progress("denoise", 2, 4)
    if action == "frozen peer":
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.3)
        raise ValueError("the weights of layer 3 are bad")
    if action == "deaf peer" and rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stand_still()
    if action == "abort":
        # What gloo does now and then in the rank that lost its peer.
        if rank == 0:
            time.sleep(0.05)
            os.abort()
        files.error(ValueError("the weights of layer 3 are bad"))
        os._exit(1)
    if action == "deaf peer":
        time.sleep(0.3)
        raise ValueError("the weights of layer 3 are bad")
    if action == "kill":
        if rank == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        stand_still()
    if action == "behind" and rank == 0:
        files.progress("denoise", 3, 4)
    if action == "chatter" and rank == 0:
        for number in range(400):
            print("line", number)
    stand_still()
