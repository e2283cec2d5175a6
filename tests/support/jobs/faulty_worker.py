"""Takes the place of distributed/rank/worker.py in a copy of the pack: the real worker, with one fault on rank 1.

The fault is in fault.json beside it. Not imported by tests.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from ..group.evaluation_memory import AnsweringEnd
from ..machine.processes import descendants
from ..parallel.split_vae import RankVae
from . import real_worker, video_work

ACTION = json.loads((Path(__file__).parent / "fault.json").read_text())["action"]
FOLDER: list[Path] = []
"""The job's."""


def stuck_in_a_test() -> None:
    time.sleep(600)


def lose_ffmpeg(decode):  # type: ignore[no-untyped-def]
    """The next part takes long; meanwhile ffmpeg is killed."""

    def decode_slowly(self, latents, **how):  # type: ignore[no-untyped-def]
        parts = decode(self, latents, **how)
        yield next(parts)
        if os.environ["RANK"] == "0":
            (ffmpeg,) = [below for below in descendants(os.getpid()) if "ffmpeg" in command_of(below.pid)]
            (FOLDER[0] / "killed_at").write_text(str(time.time()))
            ffmpeg.kill()
        stuck_in_a_test()

    return decode_slowly


def another_from_the_second_on(read):  # type: ignore[no-untyped-def]
    """It has read something else than the other rank, as its digest says."""

    def read_another(self):  # type: ignore[no-untyped-def]
        request, digest = read(self)
        return request, digest if request.number == 1 else digest[::-1]

    return read_another


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def main(group, folder, files, session):  # type: ignore[no-untyped-def]
    original = video_work.VideoWork.on_step
    if ACTION == "noise" and os.environ["RANK"] == "1":
        draw = video_work.draw_noise
        video_work.draw_noise = lambda shape, seed: draw(shape, seed + 1)

    if ACTION == "another evaluation" and os.environ["RANK"] == "1":
        AnsweringEnd.read = another_from_the_second_on(AnsweringEnd.read)

    if ACTION == "ffmpeg dies":
        FOLDER.append(folder.path)
        RankVae.decode = lose_ffmpeg(RankVae.decode)

    def on_step(self, done):  # type: ignore[no-untyped-def]
        original(self, done)
        if self.rank == 1 and done == 2 and ACTION == "sleep":
            stuck_in_a_test()
        if self.rank == 1 and done == 2 and ACTION == "gpu memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 79.10 GiB in all")

    video_work.VideoWork.on_step = on_step
    return real_worker.main(group, folder, files, session)
