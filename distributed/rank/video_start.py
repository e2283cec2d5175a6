"""What a video starts from, on one rank: noise, given latents, and pictures, which the ranks encode together."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.model.config import PICTURE_ROWS
from ...wan.sampling.conditioning import Conditioning, build_conditioning
from ...wan.transformer.conditions import NONE
from ..job.input_tensors import CLIP_FEATURES, CLIP_PICTURES
from ..job.job import Job
from ..parallel.sequence import everywhere
from ..planning.gpu_memory import compute_bytes, encoding_bytes, vae_width
from ..weights.free_memory import free_bytes
from .session import Session
from .signs import RankFiles

ENCODED = ("start_image", "end_image", "control_video", "reference_images")
"""Inputs that are."""
OTHER_PARAMETERS = 1.05
"""All of a transformer's, some of them in float32, by those in the dtype of its products: 1.01 for 14B."""


class VideoStart:
    """Made once for a job, whenever it suits.

    Args:
        inputs: that came with the job (`build_conditioning`).
        noise: [C, T, h, w].
        sigma: noise level of the first step.
    """

    def __init__(
        self, job: Job, session: Session, files: RankFiles, checkpoint: Checkpoint, inputs: dict[str, Tensor],
        noise: Tensor, sigma: float,
    ) -> None:  # fmt: skip
        self._job, self._session, self._files, self._checkpoint = job, session, files, checkpoint
        self._inputs, self._noise, self._sigma = inputs, noise, sigma
        self._seen: dict[str, Tensor] = {}
        self._made: Conditioning | None = None
        self._pictures = [name for name in ENCODED if name in inputs]

    def look(self) -> None:
        """Has CLIP see the pictures that came for it. Collective."""
        if CLIP_PICTURES not in self._inputs:
            return
        pictures, session = self._inputs[CLIP_PICTURES], self._session
        # One rank looks: reading the model takes longer than running it.
        rows, channels = len(pictures) * PICTURE_ROWS, self._checkpoint.config.clip_dim
        features = torch.zeros(rows, channels, device=session.device)
        if session.rank == 0:
            files = self._job.model.clip_vision
            paths = [file.path for file in files]
            features.copy_(session.pictures.features(paths, pictures, version=files, say=self._files.say))
        if session.mesh is not None:
            dist.broadcast(features, src=0)
        self._seen = {CLIP_FEATURES: features.cpu()}

    def conditioning(self) -> Conditioning:
        """Collective the first time, where there are pictures."""
        if self._made is None:
            self._made = build_conditioning(
                self._inputs | self._seen, self._noise, variant=self._checkpoint.config.variant,
                num_frames=self._job.sampling.num_frames, sigma=self._sigma, add_noise=self._job.sampling.add_noise,
                encode=self._encode,
            )  # fmt: skip
        return self._made

    def grid(self) -> tuple[int, int, int]:
        """Tokens per axis of the whole sequence."""
        conditions = NONE if self._made is None else self._made.conditions
        return conditions.grid(tuple(self._noise.shape))

    def waits_for_reading(self, experts: int) -> bool:
        """Whether pictures are encoded while weights are read: there are both, and room for both. Collective.

        Args:
            experts: that are going to be loaded.
        """
        config = self._checkpoint.config
        if not self._pictures or self._session.experts.models or config.reference_frame:
            # What is in front of the video decides which tokens a rank has.
            return False
        parallel, sampling = self._job.parallel, self._job.sampling
        parameters = sum(map(math.prod, self._checkpoint.shapes.values()))
        weights = parameters * compute_bytes(parallel) * OTHER_PARAMETERS
        if not parallel.parks_experts:
            weights *= experts
        latents = config.variant.latents
        vae = latents.vae_bytes * vae_width(parallel) // 2
        working = encoding_bytes(latents, sampling.width, sampling.height, sampling.num_frames, parallel)
        room = free_bytes(self._session.device, parallel.gpus_per_host) >= weights + vae + working
        group = self._session.group
        return room if group is None else everywhere(room, group, self._session.device)

    def _encode(self, video: Tensor) -> Tensor:
        """[1, 3, n, H, W] in -1 to 1 -> [1, C, T, h, w] on the CPU. Collective."""
        given = [name.replace("_", " ") for name in self._pictures]
        self._files.say(f"encoding the {' and the '.join(given) or 'control'}")
        with self._files.span("VAE loaded"):
            vae = self._session.vae(self._job)
        with self._files.span("pictures encoded"):
            return vae.encode(video).cpu()
