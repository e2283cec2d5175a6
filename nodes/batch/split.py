"""How the GPUs of a batch are shared out: groups of equal size, each making one video at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ...distributed.job.job import ModelFiles
from ...distributed.machine.gpus import Gpu
from ...wan.files.headers import brief
from ..host.status import Status
from ..settings.spread import DistributedConfig

WEIGHTS_SHARE = 0.6
"""Of a GPU's memory that weights may take; the rest is for the video."""


def splits(
    chosen: DistributedConfig,
    videos: int,
    gpus_per_video: int,
    *,
    model: ModelFiles,
    visible: str | None,
    status: Status,
) -> Iterator[list[DistributedConfig]]:
    """Ways to share out the GPUs, the best one first: one config per group, each with its own GPUs.

    Args:
        gpus_per_video: 0 for as few as keep all GPUs busy: with V videos and G GPUs, the groups are the largest
            divisor of G that is at most V and leaves each group enough memory for the weights; then smaller divisors.
        visible: the user's CUDA_VISIBLE_DEVICES; None for no limit.
    Raises:
        ValueError: a group would need more GPUs than there are, all groups the same port, or other machines.
    """
    from ...distributed.machine.gpus import choose_gpus, list_gpus

    if chosen.hosts:
        raise ValueError(
            f"hostfile is {brief(chosen.hostfile)}; a batch runs on this machine only, one group per video"
        )
    count, ids = choose_gpus(chosen.gpu_count, chosen.gpu_ids, visible)
    if gpus_per_video > count:
        raise ValueError(f"gpus_per_video is {gpus_per_video}; it must be 0 (auto) to {count}, the GPUs of this node")
    if gpus_per_video:
        groups = min(count // gpus_per_video, videos)
        used = gpus_per_video * groups
        if used < count:
            idle = ", ".join(ids[used:])
            what = f"GPU {idle}" if idle else f"processes beyond {used}"
            status.warn(f"batch: {groups} groups of {gpus_per_video} leave nothing to do for {what}")
        ways = [groups]
    else:
        fewest = fewest_gpus(model, chosen, [gpu for gpu in list_gpus() if gpu.index in ids]) if ids else 1
        divisors = [n for n in range(min(count, videos), 0, -1) if count % n == 0]
        ways = [groups for groups in divisors if count // groups >= fewest]
    for groups in ways:
        if groups > 1 and chosen.master_port:
            raise ValueError(
                f"master_port is {chosen.master_port}, and {groups} videos are made at a time, which cannot share a "
                "port; set it to 0"
            )
        size = gpus_per_video or count // groups
        parts = [ids[size * group : size * (group + 1)] for group in range(groups)]
        yield [dataclasses.replace(chosen, gpu_count=size, gpu_ids=",".join(part)) for part in parts]


def fewest_gpus(model: ModelFiles, chosen: DistributedConfig, gpus: Sequence[Gpu]) -> int:
    """GPUs of which each can hold its part of the weights; only FSDP makes the part smaller."""
    experts = [sum(file.size for file in files) for files in (model.high_noise, model.low_noise)]
    weights = max(experts) if chosen.offload_model else sum(experts)
    room = int(min((gpu.total_bytes for gpu in gpus), default=0) * WEIGHTS_SHARE)
    # No GPU, or one whose memory is not known.
    if not chosen.use_fsdp or not room:
        return 1
    return min(-(-weights // room), len(gpus))
