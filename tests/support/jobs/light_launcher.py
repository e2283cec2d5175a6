"""Takes the place of deepspeed.launcher.runner in a copy of the pack: the same pdsh command without the imports.

DeepSpeed takes five seconds to import, three times for each job; one test starts it for real.
"""

from __future__ import annotations

import os
import subprocess
import sys


def main(arguments: list[str]) -> None:
    hostfile = next(a for a in arguments if a.startswith("--hostfile=")).partition("=")[2]
    with open(hostfile) as file:
        hosts = [line.split()[0] for line in file]
    script = arguments[arguments.index("--no_local_rank") + 1 :]
    remote = [f"cd {os.getcwd()}; RANK=%n", sys.executable, "-u", *script]
    done = subprocess.run(["pdsh", "-S", "-f", "1024", "-w", ",".join(hosts), *remote])
    if done.returncode:
        sys.exit(done.returncode)
