"""Runs a function of `rank_functions.py` on several gloo ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT = 240
"""Seconds for all ranks together."""


def run_ranks(function: str, world: int, **arguments: Any) -> list[dict[str, Any]]:
    """Calls `rank_functions.<function>(rank, world, **arguments)` on every rank. Returns their dicts, in rank order.

    Raises:
        AssertionError: with the output of the ranks, if one of them failed or none ended in time.
    """
    with tempfile.TemporaryDirectory() as temp:
        command = [sys.executable, __file__, function, str(world), temp, json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        # A session of its own: at the time-out all ranks end with it.
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == 0, output
        return [json.loads(Path(temp, f"result{rank}.json").read_text()) for rank in range(world)]


def _main() -> int:
    """Imports once, then forks the ranks."""
    function, world, temp, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    from forks import fork_ranks
    from mount import mount_pack

    mount_pack()
    import torch
    import torch.distributed as dist

    torch.set_grad_enabled(False)
    import rank_functions

    def run(rank: int) -> int:
        dist.init_process_group("gloo", store=dist.FileStore(f"{temp}/store", world), rank=rank, world_size=world)
        try:
            result = getattr(rank_functions, function)(rank, world, **arguments)
        except BaseException:
            print(f"rank {rank} failed:", flush=True)
            raise
        finally:
            dist.destroy_process_group()
        Path(temp, f"result{rank}.json").write_text(json.dumps(result or {}))
        return 0

    return int(any(fork_ranks(run, world)))


if __name__ == "__main__":
    raise SystemExit(_main())
