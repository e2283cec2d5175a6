"""Runs a function of `rank_functions.py` on several gloo ranks."""

from __future__ import annotations

import json
import os
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
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, function, str(rank), str(world), temp, json.dumps(arguments)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [
            f"rank {r}:\n{out}" for r, (p, out) in enumerate(zip(processes, outputs, strict=True)) if p.returncode
        ]
        assert not failed, "\n".join(failed)
        return [json.loads(Path(temp, f"result{rank}.json").read_text()) for rank in range(world)]


def _main() -> None:
    function, rank, world, temp, arguments = sys.argv[1:]
    from golden import mount_pack

    mount_pack()
    import torch
    import torch.distributed as dist

    torch.set_grad_enabled(False)
    import rank_functions

    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{temp}/store", int(world)), rank=int(rank), world_size=int(world)
    )
    try:
        result = getattr(rank_functions, function)(int(rank), int(world), **json.loads(arguments))
    finally:
        dist.destroy_process_group()
    Path(temp, f"result{rank}.json").write_text(json.dumps(result or {}))


if __name__ == "__main__":
    _main()
