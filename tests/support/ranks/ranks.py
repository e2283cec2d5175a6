"""Runs a function of `rank_functions.py` on several gloo ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from forks import fork_ranks


def run_ranks(function: str, world: int, **arguments: Any) -> list[dict[str, Any]]:
    """Calls `rank_functions.<function>(rank, world, **arguments)` on every rank. Returns their dicts, in rank order.

    Raises:
        AssertionError: with the output of the ranks, if one of them failed or did not end in time.
    """
    with tempfile.TemporaryDirectory() as temp:
        log = Path(temp, "log")
        codes = fork_ranks(functools.partial(_call, function, world, Path(temp), arguments), world, log=log)
        assert not any(codes), f"exit codes {codes}\n{log.read_text(errors='replace')}"
        return [json.loads(Path(temp, f"result{rank}.json").read_text()) for rank in range(world)]


def _call(function: str, world: int, folder: Path, arguments: dict[str, Any], rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_grad_enabled(False)
    import rank_functions

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    try:
        result = getattr(rank_functions, function)(rank, world, **arguments)
    except BaseException:
        print(f"rank {rank} failed:", flush=True)
        raise
    finally:
        dist.destroy_process_group()
    (folder / f"result{rank}.json").write_text(json.dumps(result or {}))
