"""The groups of processes as the page's panel shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...distributed.group.signs_of_life import SignsOfLife
from ...distributed.job.errors import counted
from ...distributed.job.job import Parallel
from ...distributed.job.progress import read_progress
from ...distributed.launch.pool import GroupView
from ...distributed.machine.usage import Usage, all_gpus, gpu_usage, process_usage


def shown(groups: Sequence[GroupView]) -> list[dict[str, Any]]:
    """JSON for each group: what it is, what it does, how long it stays, what it uses.

    Takes up to five seconds where nvidia-smi hangs.
    """
    gpus = all_gpus() if any(group.parallel.gpu_ids for group in groups) else {}
    return [_one(group, gpus) for group in groups]


def _one(group: GroupView, gpus: Mapping[str, Usage]) -> dict[str, Any]:
    progress = None if group.idle or group.job is None else read_progress(group.job)
    text = "waits for the next video" if group.idle else "starting" if progress is None else progress.text
    return {
        "id": group.id,
        "model": _model_name(group),
        "state": "warm" if group.idle else "running",
        "text": text,
        "fraction": None if progress is None else progress.fraction,
        "ends_with_job": group.released,
        "seconds_left": None if group.seconds_left is None else round(group.seconds_left),
        "place": place_of(group.parallel),
        "usage": [
            {"name": usage.name, "used": usage.used_bytes, "total": usage.total_bytes, "percent": usage.percent}
            for usage in _usages(group, gpus)
        ],
    }


def _model_name(group: GroupView) -> str:
    """The name of the checkpoint, or of its folder."""
    path = Path(group.transformer[0].path)
    return path.name if len(group.transformer) == 1 else path.parent.name


def place_of(parallel: Parallel) -> str:
    """Where a group's processes run."""
    if parallel.hosts:
        return f"{counted(parallel.gpu_count, 'process', 'processes')} on {', '.join(parallel.hosts)}"
    if parallel.gpu_ids:
        return f"GPU{'s' * (parallel.gpu_count > 1)} {', '.join(parallel.gpu_ids)}"
    return counted(parallel.gpu_count, "CPU process", "CPU processes")


def _usages(group: GroupView, gpus: Mapping[str, Usage]) -> list[Usage]:
    if group.parallel.hosts:
        return []
    if group.parallel.gpu_ids:
        return gpu_usage(group.parallel.gpu_ids, gpus)
    if group.ranks or group.job is None:
        return process_usage(group.ranks)
    seen = SignsOfLife(group.job, group.parallel).ranks()
    return process_usage(seen[rank].process for rank in sorted(seen))
