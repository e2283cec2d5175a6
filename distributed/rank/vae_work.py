"""Latents decoded or frames encoded, on one rank: what is given and what is made lie in ComfyUI's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...wan.vae.latents import denormalise, normalise
from ...wan.video.arriving import Arriving
from ..job.errors import listed
from ..job.job import JobError, VaeJob
from ..machine.memory_file import OpenedMemory
from ..planning.vae_plan import held_bytes, working_bytes
from .report import gather_peaks, result_of
from .work import Work, decoded, vae_needs


class VaeWork(Work[VaeJob]):
    """One call of the VAE: a batch of videos of one shape."""

    def run(self) -> None:
        job = self.job
        with self.phase("start", "connecting the processes" if self.session.world > 1 else ""):
            self.begin()
            self.check_same_job()
            given, made = self.opened()
        with self.phase("load"):
            new = not self.session.holds_vae(job)
            self.files.say("loading the VAE" if new else "")
            # A model that is there stays if one frame at a time fits beside it: little slower than several.
            needed = vae_needs(self.session, working_bytes(job, 1)) + (held_bytes(job) if new else 0)
            self.session.experts.make_room(needed, but="", parks=False, ranks=self.session.world)
            self.session.vae(job)
        with self.phase("encode" if job.encode else "decode"):
            for number, (one, out) in enumerate(zip(given, made, strict=True)):
                (self.encode if job.encode else self.decode)(number, one, out)
                self.session.check_stop(self.folder, job)
        peaks = gather_peaks(self.session)
        if self.rank == 0:
            result = result_of(job, self.session, phases=self.phase_seconds, step_seconds=[], peaks=peaks)
            self.folder.write_json(self.folder.result, result)

    def opened(self) -> tuple[Tensor, Tensor]:
        """What is given, and where to put what is made."""
        memory = OpenedMemory(Path(str(self.folder.read_json(self.folder.pictures)["memory"])))
        mapped = memory.map(self.job.memory[1].stop)
        memory.close()
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        before, behind = self.job.memory
        given, made = whole[before].view(getattr(torch, self.job.given_dtype)), whole[behind].view(torch.float32)
        return given.view(self.job.given), made.view(self.job.made)

    def encode(self, number: int, frames: Tensor, out: Tensor) -> None:
        """[3, F, H, W] in -1 to 1 -> [C, T, h, w]."""
        total = self.job.given[0]
        self.files.progress("encode", number, total)
        latents = self.session.vae(self.job).encode(frames[None])
        latents = denormalise(latents, latents.shape[1])[0]
        self.check_shape(latents, out)
        if self.rank == 0:
            out.copy_(latents)
        self.files.progress("encode", number + 1, total)

    def decode(self, number: int, latents: Tensor, out: Tensor) -> None:
        """[C, T, h, w] -> [3, F, H, W], not cut to -1 to 1. Stops between two parts if the job is cancelled."""
        vae, frames = self.session.vae(self.job), out.shape[1]
        split = vae.splits(latents.shape[-2])
        before, total, done = number * frames, self.job.made[0] * frames, 0
        self.files.progress("decode", before, total)
        for part in _arrived(decoded(self.session, self.job, normalise(latents, latents.shape[0]), clamp=False)):
            if part is not None:
                place = out[:, done : done + part.shape[1]]
                self.check_shape(part, place)
                place.copy_(part)
                done += part.shape[1]
            self.files.progress("decode", before + done, total)
            if split:
                self.session.check_stop(self.folder, self.job)
            elif self.folder.stop.exists():
                # The others wait for this rank behind the loop.
                return
        if self.rank == 0 and done != frames:
            raise JobError(f"the VAE made {done} frames; ComfyUI expects {frames}")

    def check_shape(self, made: Tensor, place: Tensor) -> None:
        if made.shape != place.shape:
            raise JobError(f"the VAE made [{listed(made.shape)}]; ComfyUI expects [{listed(place.shape)}]")


def _arrived(parts: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """Each on the CPU, once the next one has begun on the GPU."""
    waits: list[Arriving | None] = []
    for part in parts:
        # In the order of pixels, which the GPU is faster at than one core.
        waits.append(None if part is None else Arriving(part.contiguous()))
        if len(waits) > 1:
            before = waits.pop(0)
            yield None if before is None else before.there()
    for last in waits:
        yield None if last is None else last.there()
