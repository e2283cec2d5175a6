"""Evaluations of a transformer, on one rank: one after another, as a sampler elsewhere asks for them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.model.ops import Rope
from ...wan.model.patch import patchify, token_grid, unpatchify
from ...wan.model.rope import rope_table
from ...wan.transformer.conditions import Beside
from ...wan.transformer.context import Context
from ..group.evaluation_memory import AnsweringEnd
from ..group.evaluation_request import Evaluation, Request
from ..job.job import ForwardsJob, JobError
from ..job.model_files import ExpertFiles
from ..job.progress import steady_seconds
from ..machine.bell import Bell, BellRope
from ..parallel.parallelize import release_gathered, set_shard
from ..parallel.passes import Pass, evaluate_passes
from ..parallel.sequence import SequenceShard, gather_bytes
from ..planning.gpu_memory import Workload, evaluation_bytes, weights_at_rest
from ..planning.workload import workload_of_forwards
from ..weights.warm_up import BesideReading
from .kept_conditions import KeptConditions
from .report import gather_peaks, result_of
from .session import Stopped
from .work import Work

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.25
"""Between two looks for a cancel, while nothing is asked for."""
SIGN_SECONDS = 5.0
"""Between two signs of life meanwhile, or a quarter of the time in which one is expected."""
KEPT_GRIDS = 4
"""Of whose tokens the places are kept: of a whole video, and of the windows and areas of one."""
STEPS_TOLD = 1000
"""Steps whose seconds are told."""
STOP = bytes(hashlib.sha256().digest_size)
"""In the place of a request's digest, from a rank that has seen the cancel."""


class ForwardsWork(Work[ForwardsJob]):
    """Serves one sampling."""

    def run(self) -> None:
        with self.phase("start", "connecting the processes" if self.session.world > 1 else ""):
            self.begin()
            self.check_same_job()
            paths = self.folder.read_json(self.folder.evaluations)
            self.memory, self.answers = AnsweringEnd(Path(str(paths["memory"]))), BellRope(Path(str(paths["answers"])))
            self.config = Checkpoint([file.path for file in self.job.model]).config
            keeps = not self.job.parallel.memory_optimization
            self.conditions = KeptConditions(self.config, self.device, keeps=keeps)
            self.placed: dict[tuple[int, int, int], tuple[SequenceShard, Rope]] = {}
            self.roomy: set[tuple[tuple[int, ...], int]] = set()
            """Shapes and numbers of controls for which there is room."""
            self.done = 0
            self.step_seconds: list[float] = []
        with contextlib.closing(self.memory), contextlib.closing(self.answers):
            with self.phase("load"):
                self.load()
            with self.phase("denoise"), self.session.kernel.activate(), Bell(self.folder.bell(self.rank)) as bell:
                while (evaluation := self.next_request(bell).evaluation) is not None:
                    self.serve(evaluation)
        self.finish()

    def load(self) -> None:
        """The job's model; what others a sampling before had stays as far as there is room."""
        session, parallel = self.session, self.job.parallel
        wanted = ExpertFiles(self.job.model, self.job.loras, self.job.side or None)
        self.name = session.experts.named(wanted.files)
        # Of no video yet: its size comes with the first evaluation.
        work = self.workload((1, 2, 2))
        if not session.experts.is_on_device(self.name):
            self.make_room(weights_at_rest(work, parallel))
        shard = session.shard(self.job, (1, 1, 1))
        session.experts.load(
            [self.name], {self.name: wanted}, parallel, session.mesh, shard, self.files.say,
            BesideReading(lambda model: session.get_ready(model, self.job, None, self.files.span), self.files.span),
        )  # fmt: skip
        session.experts.weights[self.name].fetch()
        self.model = session.experts.models[self.name]

    def workload(self, size: tuple[int, ...], controls: int = 0) -> Workload:
        """Of evaluations of latents of this size: frames, rows and columns."""
        return workload_of_forwards(
            self.job.model, size, self.job.parallel, steps=1, guided=True, loras=self.job.loras,
            expert=self.job.side or None, controls=controls,
        )  # fmt: skip

    def make_room(self, needed: int) -> None:
        self.session.make_room(needed, but=self.name, parks=self.job.parallel.parks_experts)

    def next_request(self, bell: Bell) -> Request:
        """Waits for it, giving signs of life. Raises Stopped if the job is cancelled, on all ranks."""
        told, interval = time.monotonic(), min(SIGN_SECONDS, self.job.parallel.stall_timeout / 4)
        while not (stop := self.folder.stop.exists()) and self.memory.asked == self.done:
            bell.wait(IDLE_SECONDS)
            if time.monotonic() - told >= interval:
                told = time.monotonic()
                self.report()
        self._began = time.perf_counter()
        # A rank that has seen the cancel says so where the others ask for the same evaluation: none waits in vain.
        request, digest = (None, STOP) if stop else self.memory.read()
        if self.session.mesh is not None and STOP in gather_bytes(digest, self.device):
            raise Stopped
        if request is None:
            raise Stopped
        self.check_all_have(digest, "another evaluation to compute")
        if request.number != self.done + 1:
            raise JobError(f"evaluation {request.number} is asked for after {self.done}; it must be the next one")
        return request

    def serve(self, evaluation: Evaluation) -> None:
        """Computes an evaluation. Collective; rank 0 answers."""
        _, channels, *size = evaluation.shape
        if channels != self.config.in_dim:
            raise JobError(f"the latents have {channels} channels; this model takes {self.config.in_dim}")
        self.conditions.check(evaluation)
        views = self.memory.parts(evaluation)
        latents = torch.frombuffer(views[0], dtype=torch.float32).view(evaluation.shape).to(self.device)
        timesteps = torch.frombuffer(views[1], dtype=torch.float32).view(evaluation.shape[0], -1)
        in_front = evaluation.in_front
        frames, *sides = size
        grid = token_grid((channels, frames + in_front, *sides))
        shard, rope = self.places(grid)
        self.conditions.take(evaluation, views[2], shard)
        self.make_room_for(evaluation)
        set_shard(self.model, shard)
        texts, besides = self.conditions.texts(evaluation), self.conditions.besides(evaluation, shard)
        padded = F.pad(latents, (0, 0, 0, 0, in_front, 0))
        passes = [self.asked(padded[i], timesteps[i], texts[i], besides[i], shard) for i in range(len(texts))]
        # Frames that are given have timestep 0.
        self.model.compute_exactly(not self.job.rounded.holds(timesteps.max().item()))
        velocities = evaluate_passes(self.model, passes, rope, self.session.mesh)
        group = None if self.session.mesh is None else self.session.mesh.ulysses_group
        velocity = torch.empty(len(passes), self.config.out_dim, *size)
        for i, tokens in enumerate(velocities):
            whole = shard.gather(tokens, group)
            if self.rank == 0:
                velocity[i] = unpatchify(whole, grid)[:, in_front:]
        self.answer(evaluation, latents, velocity)

    def make_room_for(self, evaluation: Evaluation) -> None:
        """For evaluations of its size, once."""
        controls = evaluation.count("controls")
        frames, *sides = evaluation.shape[2:]
        size = frames + evaluation.in_front, *sides
        asked = (evaluation.shape[0], *size), controls
        if asked in self.roomy:
            return
        work = replace(self.workload(size, controls), given_frames=evaluation.by_frame)
        self.make_room(evaluation_bytes(work, self.job.parallel))
        self.roomy.add(asked)

    def places(self, grid: tuple[int, int, int]) -> tuple[SequenceShard, Rope]:
        """This rank's tokens of a video of `grid` tokens, and their rotations."""
        known = self.placed.pop(grid, None)
        if known is None:
            shard = self.session.shard(self.job, grid)
            rope = rope_table(grid, self.config.head_dim, start=shard.start, stop=shard.stop, device=self.device)
            known = shard, rope
        self.placed[grid] = known
        for old in list(self.placed)[:-KEPT_GRIDS]:
            del self.placed[old]
        return known

    def asked(self, latents: Tensor, timesteps: Tensor, text: Context, beside: Beside, shard: SequenceShard) -> Pass:
        """One sample. latents: [C, T, h, w]; timesteps: [1], or [T] by latent frame."""
        different, index = timesteps.unique(return_inverse=True)
        which = None
        if len(different) > 1:
            by_token = index.repeat_interleave(shard.length // len(timesteps))
            which = shard.split(by_token[:, None])[:, 0].to(self.device)
        return Pass(shard.split(patchify(latents)), different.to(self.device), text, which, beside)

    def answer(self, evaluation: Evaluation, latents: Tensor, velocity: Tensor) -> None:
        if self.rank == 0:
            if not velocity.isfinite().all():
                of = "the latents that the sampler gave are" if not latents.isfinite().all() else "the velocity is"
                raise JobError(
                    f"{of} not finite; with mixed_precision fp16 try bf16, otherwise the weights are damaged or made "
                    "for another model, or the sampler's settings take it out of all bounds"
                )
            self.memory.write(evaluation, velocity.shape[1], velocity.numpy().data)
        self.done += 1
        if self.session.mesh is not None:
            # None of them reads what the next request overwrites.
            gather_bytes(b"\0", self.device)
        if self.rank == 0:
            self.memory.say_answered(self.done)
            self.answers.ring()
        self.step_seconds.append(time.perf_counter() - self._began)
        self.report()

    def report(self) -> None:
        """A sign of life, and how far the sampler is."""
        steady = steady_seconds(self.step_seconds) if self.step_seconds else None
        message = f"{self.done} evaluation{'s' * (self.done != 1)} for ComfyUI's sampler"
        self.files.progress("denoise", self.done, 0, seconds_per_step=steady, message=message)

    def finish(self) -> None:
        release_gathered(self.model)
        peaks = gather_peaks(self.session)
        if not self.job.parallel.stays:
            self.session.experts.drop()
        if self.rank == 0:
            result = result_of(
                self.job, self.session, phases=self.phase_seconds, step_seconds=self.step_seconds[:STEPS_TOLD],
                peaks=peaks, evaluations=self.done,
            )  # fmt: skip
            self.folder.write_json(self.folder.result, result)
