"""Takes the place of rank/worker.py in a copy of the pack: ranks without torch, which do what fault.json says.

Not imported by tests. Standard library only, so that a real agent with two such ranks is up in the time torch takes to
import once.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from .fake_agent import write_result

FAULT = json.loads((Path(__file__).parent / "fault.json").read_text())
ENVIRONMENT = dict(os.environ)
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
OutOfMemoryError = type(
    "OutOfMemoryError", (RuntimeError,), {"__module__": "torch", "__qualname__": "OutOfMemoryError"}
)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def wait_until_told() -> None:
    """By a file, for a test that wants to look first."""
    if "until" in FAULT:
        wait_for(Path(FAULT["until"]))


def stand_still() -> None:
    time.sleep(600)


def main(group, folder, files, session):  # type: ignore[no-untyped-def]
    rank, action = int(os.environ["RANK"]), FAULT["action"]
    two = os.environ["WORLD_SIZE"] == "2"
    files.progress("load", 0, 0)
    (folder.path / f"rank{rank}.ready").touch()
    if two:
        wait_for(folder.path / f"rank{1 - rank}.ready")
    if action in WHILE_LOADING and rank == 1:
        WHILE_LOADING[action](folder)
    if action in WHILE_LOADING:
        stand_still()
    if two and rank == 0:
        # The job's progress is rank 0's, and tests act on it: by then the other one must be as far.
        wait_for(folder.path / "rank1.denoises")
    files.progress("denoise", 2, 4)
    (folder.path / f"rank{rank}.denoises").touch()
    if action == "good":
        time.sleep(FAULT.get("seconds", 0))
        wait_until_told()
        if rank == 0:
            write_result(folder.path)
        return session
    if action in PEERS and rank == 0:
        PEERS[action](files)
        stand_still()
    if action in ACTIONS and rank == FAULT.get("rank", 1):
        time.sleep(FAULT.get("delay", 0.0))
        wait_until_told()
        ACTIONS[action](folder, files)
    stand_still()
    return session


def start_child(folder) -> None:  # type: ignore[no-untyped-def]
    """In a session of its own and deaf to SIGTERM: a compiler, or a helper of a library."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True, stdin=subprocess.DEVNULL)
    (folder.path / "child.pid").write_text(str(child.pid))


def use_too_much_memory(folder) -> None:  # type: ignore[no-untyped-def]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
    raise AssertionError([bytearray(16 << 20) for _ in range(100)])


def fail(folder, files) -> None:  # type: ignore[no-untyped-def]
    raise ValueError("the weights of layer 3 are bad")


def abort_with_an_error_written(folder, files) -> None:  # type: ignore[no-untyped-def]
    files.error(ValueError("the weights of layer 3 are bad"))
    os._exit(1)


def fill_the_disk(folder, files) -> None:  # type: ignore[no-untyped-def]
    import numpy
    from safetensors.numpy import save_file

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, 4 << 10))
    save_file({"samples": numpy.zeros(4096, numpy.float32)}, folder.latents)


def fill_up(folder) -> None:  # type: ignore[no-untyped-def]
    """Until there is room for nothing more, not even for the error."""
    with open(folder.path / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def chatter(folder, files) -> None:  # type: ignore[no-untyped-def]
    for number in range(400):
        print("line", number)
    stand_still()


def ignore_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def echo(files) -> None:  # type: ignore[no-untyped-def]
    """What a collective raises whose peer is gone: as soon as that has written down why."""
    wait_for(files._folder.error(1))
    time.sleep(FAULT["echo_after"])
    raise RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4242")


def abort(files) -> None:  # type: ignore[no-untyped-def]
    """What gloo does now and then in the rank that lost its peer."""
    wait_for(files._folder.error(1))
    time.sleep(0.05)
    os.abort()


WHILE_LOADING = {
    "killed while loading": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    "host memory": use_too_much_memory,
    "disk filled while loading": fill_up,
}
"""What rank 1 does before the first step; rank 0 waits for it."""
ACTIONS = {
    "raise": fail,
    "frozen peer": fail,
    "deaf peer": fail,
    "echo": fail,
    "abort": abort_with_an_error_written,
    "full disk": fill_the_disk,
    "chatter": chatter,
    "disk filled": lambda folder, files: fill_up(folder),
    "child": lambda folder, files: start_child(folder),
    "segfault": lambda folder, files: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": lambda folder, files: os.kill(os.getpid(), signal.SIGSTOP),
    "deaf": lambda folder, files: ignore_signals(),
    "return": lambda folder, files: os._exit(0),
    "environment": lambda folder, files: (folder.path / "environment.json").write_text(json.dumps(ENVIRONMENT)),
}
"""What one rank does at step 2 of 4; without one it stands still."""
PEERS = {
    "frozen peer": lambda files: os.kill(os.getpid(), signal.SIGSTOP),
    "deaf peer": lambda files: ignore_signals(),
    "echo": echo,
    "abort": abort,
    "behind": lambda files: files.progress("denoise", 3, 4),
}
"""What rank 0 does meanwhile."""
