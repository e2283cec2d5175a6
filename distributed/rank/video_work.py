"""A video, on one rank: encodes, loads, denoises, decodes; rank 0 writes it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from functools import partial

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...wan.checkpoint.checkpoint import Checkpoint
from ...wan.model.config import HIGH_NOISE, LOW_NOISE, TEXT_LEN
from ...wan.sampling.denoise import Guidance, Known, denoise, draw_noise
from ...wan.sampling.schedule import make_solver
from ...wan.sampling.step_cache import StepCache
from ...wan.transformer.context import pad_text
from ...wan.transformer.transformer import WanModel
from ...wan.vae.latents import denormalise, normalise
from ...wan.vae.preview import PreviewMap
from ..group.group_folder import GroupDir
from ..job.input_tensors import CONTEXT, CONTEXT_NULL, latents_shape
from ..job.job import Job, JobError
from ..job.job_folder import JobDir
from ..job.progress import steady_seconds
from ..job.sampling import rounded_timesteps
from ..parallel.sequence import SequenceShard, mean_size
from ..planning.preflight import needs_negative
from ..weights.warm_up import BesideReading
from .expert import VelocityPredictor
from .live_preview import PreviewWriter
from .report import gather_peaks, result_of, video_of, video_size
from .session import Session
from .signs import MIN_INTERVAL, RankFiles
from .video_start import VideoStart
from .work import Work, decoded

log = logging.getLogger(__name__)


class VideoWork(Work[Job]):
    """The phases of a video on one rank, in order."""

    def __init__(self, job: Job, group: GroupDir, folder: JobDir, files: RankFiles, session: Session) -> None:
        super().__init__(job, group, folder, files, session)
        self.step_seconds: list[float] = []
        self.reused: list[int] = []
        """Indices of steps that took their velocity from an earlier one."""
        self.notes: list[str] = []
        """For the status: what only the run could know."""
        self._preview_map: PreviewMap | None = None

    def run(self) -> None:
        with self.phase("start", "connecting the processes" if self.session.world > 1 else ""):
            self.begin()
            self.prepare()
            self.check_ranks_agree()
        latents = self.kept_latents()
        if latents is None:
            with self.phase("encode"):
                texts = self.texts()
                self.start.look()
                if not self.start.waits_for_reading(len(self.needed())):
                    self.start.conditioning()
            latents = self.denoised(texts)
        self.finish(latents)

    def kept_latents(self) -> Tensor | None:
        """What an earlier run of the job has denoised [C, T, h, w], where it failed behind that."""
        if not self.folder.latents.exists():
            return None
        samples = load_file(self.folder.latents)["samples"].to(self.device)
        if tuple(samples.shape[1:]) != tuple(self.noise.shape):
            raise JobError(f"the kept latents have shape {list(samples.shape)}; the job makes {list(self.noise.shape)}")
        log.info("continuing from kept latents")
        return normalise(samples[0], samples.shape[1])

    def prepare(self) -> None:
        """The schedule, and the noise that it starts from."""
        sampling, model = self.job.sampling, self.job.model
        checkpoint = Checkpoint([file.path for file in model.transformer])
        self.config = checkpoint.config
        self.inputs = load_file(self.folder.inputs) if self.folder.inputs.exists() else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.inputs.items()}
        self.noise = draw_noise(latents_shape(self.job, self.config, shapes), sampling.seed)
        self.steps = sampling.step_range
        self.solver = make_solver(sampling.solver, sampling.schedule_steps, sampling.shift, self.steps.start)
        first = self.steps.start
        # At its very start a schedule is pure noise, also where a solver's grid begins a hair below 1.
        sigma = self.solver.sigmas[first] if first else 1.0
        self.start = VideoStart(self.job, self.session, self.files, checkpoint, self.inputs, self.noise, sigma)
        present = [name for name in (HIGH_NOISE, LOW_NOISE) if getattr(model, name)]
        self.guidance = Guidance(
            low=sampling.guidance_low, high=sampling.guidance_high, boundary=sampling.boundary,
            only=present[0] if len(present) == 1 else None,
        )  # fmt: skip

    def check_ranks_agree(self) -> None:
        """Raises JobError naming the first rank that has other inputs or other noise than rank 0."""
        digest = hashlib.sha256(self.folder.job.read_bytes())
        if self.folder.inputs.exists():
            digest.update(self.folder.inputs.read_bytes())
        digest.update(self.noise.numpy().tobytes())
        self.check_all_have(digest.digest(), "another job, other inputs or other noise")

    def texts(self) -> dict[bool, Tensor]:
        """Conditional? -> text tokens [n, text_dim]; the unconditional ones only where guidance needs them."""
        negative = needs_negative(self.job.model, self.job.sampling)
        if self.job.text is None:
            return {True: self.inputs[CONTEXT]} | ({False: self.inputs[CONTEXT_NULL]} if negative else {})
        # One rank encodes: the encoder is large, its output small.
        texts = torch.zeros(1 + negative, TEXT_LEN, self.config.text_dim, device=self.device)
        if self.rank == 0:
            encoded = self.session.prompts.encode(self.job, negative=negative, say=self.files.say)
            self.notes += self.session.prompts.notes
            texts = torch.stack([pad_text(text.to(texts)) for text in encoded])
        if self.session.mesh is not None:
            dist.broadcast(texts, src=0)
        return dict(zip((True, False), texts, strict=False))

    def needed(self) -> list[str]:
        """The experts that the schedule runs."""
        runs = {self.guidance.expert(self.solver.timesteps[index]) for index in self.steps}
        return [name for name in (HIGH_NOISE, LOW_NOISE) if name in runs]

    def while_reading(self, model: WanModel, shard: SequenceShard) -> None:
        """What else is to be done before the first step. Collective."""
        self.session.get_ready(model, self.job, shard, self.files.span)
        self.start.conditioning()
        self.preview_map()
        # What all of it left in torch's hands would be cut up by the weights that come next.
        self.session.rest()

    def preview_map(self) -> PreviewMap | None:
        """On the rank that shows the video to come, if one does."""
        if self._preview_map is None and self.job.preview and self.rank == 0:
            self.files.say("preparing the live picture")
            with self.files.span("live picture prepared"):
                self._preview_map = self.session.preview_map(self.job)
        return self._preview_map

    def denoised(self, texts: dict[bool, Tensor]) -> Tensor:
        """Loads the experts and runs the loop. Returns the normalised latents [C, T, h, w], on every rank."""
        session, parallel = self.session, self.job.parallel
        grid = self.start.grid()
        shard = session.shard(self.job, grid)

        def tokens_of(latents: Tensor) -> Tensor:
            return shard.split(conditions.tokens(latents)).to(self.device)

        with self.phase("load"):
            wanted = {name: self.job.model.expert(name) for name in (HIGH_NOISE, LOW_NOISE)}
            session.experts.load(
                self.needed(), wanted, parallel, session.mesh, shard, self.files.say,
                BesideReading(partial(self.while_reading, shard=shard), self.files.span),
            )  # fmt: skip
            conditioning, preview_map = self.start.conditioning(), self.preview_map()
            conditions = conditioning.conditions
            self.files.say("")
            group = None if session.mesh is None else session.mesh.ulysses_group
            preview = PreviewWriter(
                self.folder.preview, preview_map=preview_map,
                grid=grid, shard=shard, group=group, steps=len(self.steps),
            ) if self.job.preview else None  # fmt: skip
        with self.phase("denoise"), session.kernel.activate():
            known = None
            if conditioning.known is not None and conditioning.known_mask is not None:
                mask = conditioning.known_mask.expand_as(conditioning.known)
                known = Known(tokens_of(conditioning.known), tokens_of(mask))
            predictor = VelocityPredictor(
                session.experts.models, texts, grid=grid, shard=shard, device=self.device,
                keep_text=not parallel.memory_optimization,
                weights=session.experts.weights if parallel.parks_experts else {},
                conditions=conditions.on_rank(shard.split, shard.length, self.device),
                which_timestep=None if known is None else known.which_timestep, mesh=session.mesh,
                arrive=self.arrive, rounded=rounded_timesteps(self.solver.timesteps, parallel.exact_steps),
            )  # fmt: skip
            self.report_steps()
            self._step_start = time.perf_counter()
            sampling = self.job.sampling
            cache = StepCache(
                predictor.predict, threshold=sampling.reuse_threshold, steps=self.steps,
                schedule_steps=sampling.schedule_steps, mean=partial(mean_size, shard=shard, group=session.group),
            )  # fmt: skip
            tokens = denoise(
                tokens_of(conditioning.latents), solver=self.solver, guidance=self.guidance,
                predict=cache,
                steps=self.steps, known=known, on_step=self.on_step, on_estimate=preview,
            )  # fmt: skip
            predictor.release()
            self.reused = cache.reused
            tokens = shard.gather(tokens, group)
        if not self.job.parallel.stays:
            session.experts.drop()
        return conditions.latents(tokens, grid)

    def arrive(self, expert: str) -> None:
        """Before an expert takes over. What it is waited for is no step's time."""
        start = told = time.perf_counter()

        def on_tensor(message: str, done: int, total: int) -> None:
            nonlocal told
            if time.perf_counter() - told >= MIN_INTERVAL:
                told = time.perf_counter()
                self.report_steps(f"loading the {message} {done / total:.0%}")

        self.session.experts.arrive(expert, on_tensor)
        if told > start:
            # Or it would be said to be loading until the step ends.
            self.report_steps()
        self._step_start += time.perf_counter() - start

    def on_step(self, done: int) -> None:
        if self.session.sparse is not None:
            self.session.sparse.enter(self.steps.start + done)
        self.session.experts.check_pending()
        if self.device.type == "cuda":
            # The step is timed and reported when it is done, not when it is queued.
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._step_start)
        self._step_start = now
        self.report_steps()
        log.info("step %d of %d: %.2f s", done, len(self.steps), self.step_seconds[-1])
        self.session.check_stop(self.folder, self.job)

    def report_steps(self, message: str = "") -> None:
        done = len(self.step_seconds)
        steady = steady_seconds(self.step_seconds) if done else None
        self.files.progress("denoise", done, len(self.steps), seconds_per_step=steady, message=message)

    def finish(self, latents: Tensor) -> None:
        """Rank 0 keeps the latents; all decode; rank 0 writes the video and, last, the result."""
        if not latents.isfinite().all():
            raise JobError(
                "the denoised latents are not finite; with mixed_precision fp16 try bf16, otherwise the weights are "
                "damaged or made for another model"
            )
        shape = [1, *latents.shape]
        if self.rank == 0:
            samples = denormalise(latents[None], latents.shape[0]).cpu().contiguous()
            partial = self.folder.latents.with_suffix(".tmp")
            save_file({"samples": samples}, partial)
            os.replace(partial, self.folder.latents)
        frames = 0
        if self.job.decode:
            frames = self.decode(latents)
        peaks = gather_peaks(self.session)
        if self.rank == 0:
            result = result_of(
                self.job, self.session, phases=self.phase_seconds, step_seconds=self.step_seconds, peaks=peaks,
                spans=self.files.spans, reused=self.reused, notes=self.notes,
                **video_of(self.job, self.session, frames=frames, latents_shape=shape),
            )  # fmt: skip
            self.folder.write_json(self.folder.result, result)

    def decode(self, latents: Tensor) -> int:
        """Decodes with all ranks, while rank 0 writes what is done. Returns the frames written: 0 on other ranks."""
        from ...wan.video.frames_file import FramesWriter
        from ...wan.video.video import VideoWriter

        sampling = self.job.sampling
        # Reference pictures are in front: to the VAE the first of them would be the video's first frame.
        _, frames, *_ = self.config.variant.latents.shape(sampling.width, sampling.height, sampling.num_frames)
        latents = latents[:, -frames:]
        if self.rank > 0:
            with self.phase("decode"):
                for _ in decoded(self.session, self.job, latents):
                    pass
            return 0
        size = video_size(self.job, self.session)
        # What is decoded after ffmpeg's end is of no use, and may take long.
        with contextlib.ExitStack() as files:
            kept = files.enter_context(FramesWriter(self.folder.frames)) if self.job.frames else None
            video = files.enter_context(VideoWriter(
                self.folder.video(sampling.file_format.suffix), **size, fps=sampling.fps,
                video_format=sampling.file_format, crf=sampling.crf, on_loss=self.files.end_process,
            ))  # fmt: skip
            with self.phase("decode"):
                parts = decoded(self.session, self.job, latents)
                self.files.progress("decode", 0, sampling.num_frames)
                for part in parts:
                    assert part is not None, "rank 0 gets whole frames"
                    video.write(part)
                    if kept is not None:
                        kept.write(part)
                    self.files.progress("decode", video.frames, sampling.num_frames)
                if self.device.type == "cuda":
                    # Or what is still computed would count as written.
                    torch.cuda.synchronize(self.device)
            with self.phase("write"):
                video.finish()
        if video.frames != sampling.num_frames:
            raise JobError(f"the VAE made {video.frames} frames; the job asks for {sampling.num_frames}")
        return video.frames
