"""On the machine that starts the job: DeepSpeed's launcher, which starts an agent on every machine of the hostfile.

ComfyUI holds the other end of this process's standard input, as with a job on one machine. When that closes, the
launcher and its ssh connections are killed, which closes the standard inputs of the agents (agent.py).
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from pathlib import Path

from ..group.agent import end_with_stdin
from .hostfile import HostsDir, check_path

BEAT_SECONDS = 1.0
SSH_OPTIONS = (
    # Nobody is there to type a password, and a dead machine or link should show within seconds.
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
)


def main(folder: HostsDir) -> int:
    """Runs until every agent has ended. Returns the exit code."""
    threading.Thread(target=end_with_stdin, args=(folder.path,), daemon=True).start()
    threading.Thread(target=_beat, args=(folder,), daemon=True).start()
    pack = Path(__file__).resolve().parent.parent
    for path in (pack, Path(sys.executable)):
        check_path(path)
    os.environ["PDSH_SSH_ARGS_APPEND"] = SSH_OPTIONS
    from deepspeed.launcher.runner import main as run_deepspeed

    run_deepspeed(
        [
            f"--hostfile={folder.hostfile}",
            "--launcher=pdsh",
            "--force_multi",
            "--no_ssh_check",
            # Not used: the agents meet through the job's folder. Unset, it would be asked for over ssh.
            "--master_addr=127.0.0.1",
            "--no_local_rank",
            str(pack),
            "host",
            str(folder.path),
        ]
    )
    return 0


def _beat(folder: HostsDir) -> None:
    for number in itertools.count():
        # In place: over NFS a renamed file may be seen late, one that is opened is always current.
        folder.heartbeat.write_text(str(number), encoding="ascii")
        time.sleep(BEAT_SECONDS)
