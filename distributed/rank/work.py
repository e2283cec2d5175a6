"""What a rank does for a job, whatever its kind."""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor

from ...wan.model.latent_space import FRAMES_AT_ONCE, LATENT_SPACES, TEMPORAL_STRIDE
from ..group.group_folder import GroupDir
from ..job.job import GroupJob, Job, JobError, VaeJob
from ..job.job_folder import JobDir
from ..parallel.sequence import everywhere, gather_bytes
from ..planning.gpu_memory import GIB, VAE_FRAGMENTATION, picture_bytes
from ..weights.free_memory import reachable_bytes
from .session import Session
from .signs import RankFiles

log = logging.getLogger(__name__)
PLAIN_KERNELS = 1.3
"""That many times as much is alive, at most, where a VAE's layers between its convolutions are not fused."""
J = TypeVar("J", bound=GroupJob)


class Work(ABC, Generic[J]):
    """One job on one rank."""

    def __init__(self, job: J, group: GroupDir, folder: JobDir, files: RankFiles, session: Session) -> None:
        self.job, self.group, self.folder, self.files, self.session = job, group, folder, files, session
        self.rank, self.device = session.rank, session.device
        self.phase_seconds: dict[str, float] = {}

    @abstractmethod
    def run(self) -> None:
        """Does it. Raises Stopped if it is cancelled between two steps."""

    def begin(self) -> None:
        """Before all else: the files are those that the job was written for, and the ranks have met."""
        for file in self.job.files:
            file.check_unchanged()
        with self.files.span("ranks meet"):
            self.session.begin(self.job, self.group)

    def check_same_job(self) -> None:
        """Raises JobError naming the first rank that has read another job than rank 0. Collective."""
        self.check_all_have(hashlib.sha256(self.folder.job.read_bytes()).digest(), "another job")

    def check_all_have(self, digest: bytes, other: str) -> None:
        """Raises JobError naming the first rank whose digest differs from rank 0's. Collective.

        Args:
            other: what such a rank has.
        """
        if self.session.mesh is None:
            return
        everyone = gather_bytes(digest, self.device)
        for rank, seen in enumerate(everyone):
            if seen != everyone[0]:
                raise JobError(f"rank {rank} has {other} than rank 0")

    @contextmanager
    def phase(self, name: str, message: str = "") -> Iterator[None]:
        self.files.progress(name, 0, 0, message=message)
        log.info("begins")
        start = time.perf_counter()
        yield
        self.phase_seconds[name] = time.perf_counter() - start
        log.info("took %.2f s%s", self.phase_seconds[name], self.session.memory())


def vae_needs(session: Session, working: int) -> int:
    """Bytes that must be free for a VAE whose tensors take `working`: with the allocator's gaps, by its kernels."""
    return int(working * (1 + VAE_FRAGMENTATION) * (PLAIN_KERNELS if session.vae_ops == "plain" else 1))


def decoded(session: Session, job: Job | VaeJob, latents: Tensor, *, clamp: bool = True) -> Iterator[Tensor | None]:
    """Parts of the video, as `RankVae.decode` yields them: of as many frames as every rank has memory for. Collective.

    Args:
        latents: [C, T, h, w], normalised.
    """
    vae = session.vae(job)
    channels, frames, rows, columns = latents.shape
    space = LATENT_SPACES[channels]
    free = reachable_bytes(session.device, job.parallel.gpus_per_host)

    def fits(at_once: int) -> bool:
        working = picture_bytes(
            space, columns * space.stride, rows * space.stride, (frames - 1) * TEMPORAL_STRIDE + 1, vae.upscale,
            job.parallel, at_once,
        )  # fmt: skip
        needed = vae_needs(session, working)
        room = free >= needed
        if not room:
            log.info("no room to decode %d frames at once: %.1f of %.1f GiB", at_once, free / GIB, needed / GIB)
        return room if session.group is None else everywhere(room, session.group, session.device)

    at_once = next((most for most in range(FRAMES_AT_ONCE, 1, -1) if fits(most)), 1)
    log.info("decoding %d frames at once", at_once)
    return vae.decode(latents[None], clamp=clamp, at_once=at_once)
