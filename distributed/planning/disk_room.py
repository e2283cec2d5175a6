"""What a video's job needs on disks, before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...wan.vae.vae_keys import check_vae_file
from ..job.job import Job

if TYPE_CHECKING:
    from torch import Tensor


def room_of(
    job: Job, tensors: Mapping[str, Tensor], jobs: Path, output: Path, *, at_once: int = 1, videos: int = 1
) -> dict[Path, int]:
    """Folder -> bytes, for `machine.prerequisites.check_space`.

    Args:
        tensors: that travel with the job.
        jobs: where its folder is: for what it is given, and what it makes.
        output: where its video is copied to, before that folder is removed.
        at_once: jobs like it whose folders are there side by side.
        videos: how many of them come to `output`.
    """
    upscale = check_vae_file(job.model.vae[0].path).upscale if job.decode else 1
    given = sum(tensor.nbytes for tensor in tensors.values())
    room = {jobs: at_once * (given + job.made_bytes(upscale))}
    room[output] = room.get(output, 0) + videos * job.video_bytes(upscale)
    return room
