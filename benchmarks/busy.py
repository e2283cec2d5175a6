"""Processes that keep every core busy, to measure and to test beside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

SPIN = (
    "import os\nparent = os.getppid()\nprint(flush=True)\nwhile os.getppid() == parent:\n for _ in range(10**6): pass\n"
)
"""Until its parent is gone: nobody else ends it when that is killed."""


class Busy:
    """The processes of `busy`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    def on(self) -> None:
        self._signal(signal.SIGCONT)

    def off(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


@contextlib.contextmanager
def busy(per_core: int) -> Iterator[Busy]:
    """`per_core` processes per core that compute all the time; they are off until they are switched on."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(per_core * len(os.sched_getaffinity(0))):
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", SPIN], stdout=subprocess.PIPE))
        for process in processes:
            # Otherwise it would still be starting when it is switched on.
            assert process.stdout is not None
            process.stdout.readline()
        load = Busy(processes)
        load.off()
        yield load
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
