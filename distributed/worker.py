"""One rank of a job: joins the group, loads, denoises; rank 0 then decodes and writes the video."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..wan.attention import choose_kernel
from ..wan.checkpoint import Checkpoint
from ..wan.config import TEXT_LEN
from ..wan.denoise import HIGH_NOISE, LOW_NOISE, Guidance, denoise, draw_noise
from ..wan.latents import denormalise
from ..wan.model import WanModel, pad_text
from ..wan.patch import patchify, token_grid, unpatchify
from ..wan.schedule import make_solver
from .experts import Experts, load_expert
from .job import VERSION, Job, JobError
from .jobdir import JobDir
from .mesh import init_mesh
from .offload import HostParking
from .preflight import latents_shape, needs_negative
from .progress import steady_seconds
from .rank_files import RankFiles
from .sequence import SequenceShard, gather_bytes

log = logging.getLogger(__name__)


def main(folder: JobDir, files: RankFiles) -> None:
    """Runs this rank (RANK, WORLD_SIZE and LOCAL_RANK from torchrun) of the job in `folder`."""
    job = folder.read_job()
    world = int(os.environ["WORLD_SIZE"])
    if world != job.parallel.gpu_count:
        raise JobError(f"WORLD_SIZE is {world}; the job was written for {job.parallel.gpu_count}")
    try:
        with torch.no_grad():
            Worker(job, folder, files, rank=int(os.environ["RANK"]), world=world).run()
    except BaseException as error:
        # Before the group is left: with NCCL that may wait for peers, which wait for this rank.
        files.error(error)
        raise
    finally:
        # A gloo process that exits inside its group may abort.
        if dist.is_initialized():
            dist.destroy_process_group()


class Worker:
    """The phases of one rank, in order."""

    def __init__(self, job: Job, folder: JobDir, files: RankFiles, *, rank: int, world: int) -> None:
        self.job, self.folder, self.files = job, folder, files
        self.rank, self.world = rank, world
        self.device = _device(job)
        self.phase_seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []
        self.kernel = choose_kernel(self.device)

    def run(self) -> None:
        with self.phase("start"):
            for file in self.job.model.all():
                file.check_unchanged()
            self.mesh = init_mesh(
                rank=self.rank,
                world=self.world,
                device=self.device,
                store_file=self.folder.process_group,
                master_port=self.job.parallel.master_port,
                # Behind the launcher's own time-outs: it sees all ranks, and so which of them the others wait for.
                timeout=max(self.job.parallel.start_timeout, self.job.parallel.stall_timeout) + 60,
            )
            self.config = Checkpoint([file.path for file in self.job.model.high_noise]).config
            self.noise = draw_noise(latents_shape(self.job.sampling, self.config.out_dim), self.job.sampling.seed)
            self.check_ranks_agree()
        with self.phase("encode"):
            texts = self.texts()
        latents = self.denoised(texts)
        peaks = self.peaks()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank == 0:
            self.finish(latents, peaks)

    def check_ranks_agree(self) -> None:
        """Raises JobError naming the first rank that has other inputs or other noise than rank 0."""
        if self.mesh is None:
            return
        digest = hashlib.sha256(self.folder.job.read_bytes())
        if self.folder.inputs.exists():
            digest.update(self.folder.inputs.read_bytes())
        digest.update(self.noise.numpy().tobytes())
        everyone = gather_bytes(digest.digest(), self.device)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise JobError(f"rank {rank} has another job, other inputs or other noise than rank 0")

    def texts(self) -> dict[bool, Tensor]:
        """Conditional? -> text rows [n, text_dim]; the unconditional ones only where guidance needs them."""
        negative = needs_negative(self.job.sampling)
        if self.job.text is None:
            inputs = load_file(self.folder.inputs)
            return {True: inputs["context"]} | ({False: inputs["context_null"]} if negative else {})
        # One rank encodes: the encoder is large, its output small.
        rows = torch.zeros(1 + negative, TEXT_LEN, self.config.text_dim, device=self.device)
        if self.rank == 0:
            rows = torch.stack([pad_text(row.to(rows)) for row in self.encode_prompts(negative)])
        if self.mesh is not None:
            dist.broadcast(rows, src=0)
        return dict(zip((True, False), rows, strict=False))

    def encode_prompts(self, negative: bool) -> list[Tensor]:
        from ..wan.text_encoder import DEFAULT_NEGATIVE_PROMPT, load_text_encoder

        text, model = self.job.text, self.job.model
        encoder = load_text_encoder(
            [file.path for file in model.text_encoder],
            [file.path for file in model.tokenizer],
            dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            device=self.device,
        )
        return encoder.encode([text.prompt] + [text.negative_prompt or DEFAULT_NEGATIVE_PROMPT] * negative)

    def denoised(self, texts: dict[bool, Tensor]) -> Tensor:
        """Loads the experts and runs the loop. Returns the normalised latents [C, T, H, W], on every rank."""
        sampling, parallel = self.job.sampling, self.job.parallel
        grid = token_grid(tuple(self.noise.shape))
        split = self.mesh is not None and parallel.use_ulysses
        shard = SequenceShard(length=math.prod(grid), rank=self.rank if split else 0, world=self.world if split else 1)
        guidance = Guidance(low=sampling.guidance_low, high=sampling.guidance_high, boundary=sampling.boundary)
        solver = make_solver(sampling.solver, sampling.steps, sampling.shift)
        with self.phase("load"):
            needed = [e for e in (HIGH_NOISE, LOW_NOISE) if e in {guidance.expert(t) for t in solver.timesteps}]
            models, weights = self.load_experts(needed, shard)
        with self.phase("denoise"), self.kernel.activate():
            experts = Experts(
                models, texts, grid=grid, shard=shard, device=self.device,
                keep_text=not parallel.memory_optimization, parkings=weights if parallel.offload_model else {},
            )  # fmt: skip
            self.files.progress("denoise", 0, sampling.steps)
            self._step_start = time.perf_counter()
            tokens = denoise(
                shard.split(patchify(self.noise)).to(self.device),
                solver=solver, guidance=guidance, predict=experts.predict, on_step=self.on_step,
            )  # fmt: skip
            tokens = shard.gather(tokens, self.mesh.get_group() if self.mesh else None)
        # Not left to the garbage collector: FSDP's hooks and the model refer to each other.
        for expert in weights.values():
            expert.drop()
        return unpatchify(tokens, grid)

    def load_experts(
        self, names: list[str], shard: SequenceShard
    ) -> tuple[dict[str, WanModel], dict[str, HostParking]]:
        """The experts that the schedule runs, and their weights. Offloaded ones are parked before the next is read."""
        models, weights = {}, {}
        # The one that runs first is read last, so that it is the one on the device.
        for index, name in enumerate(reversed(names)):

            def on_tensor(done: int, total: int, name: str = name, index: int = index) -> None:
                self.files.progress("load", index * total + done, total * len(names), message=f"{name} expert")

            if self.job.parallel.offload_model:
                for parking in weights.values():
                    parking.park()
            models[name] = load_expert(
                [file.path for file in getattr(self.job.model, name)],
                parallel=self.job.parallel, mesh=self.mesh, shard=shard, device=self.device, on_tensor=on_tensor,
            )  # fmt: skip
            weights[name] = HostParking(models[name])
        return models, weights

    def on_step(self, index: int) -> None:
        if self.device.type == "cuda":
            # The step is timed and reported when it is done, not when it is queued.
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._step_start)
        self._step_start = now
        steady = steady_seconds(self.step_seconds)
        self.files.progress("denoise", index + 1, self.job.sampling.steps, seconds_per_step=steady)
        log.info("step %d of %d: %.2f s", index + 1, self.job.sampling.steps, self.step_seconds[-1])

    def peaks(self) -> list[list[int]]:
        """[[peak GPU bytes, peak host bytes]] of every rank up to now, in rank order."""
        gpu = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        mine = torch.tensor([gpu, host], device=self.device)
        if self.mesh is None:
            return [mine.tolist()]
        everyone = mine.new_empty(self.world * 2)
        dist.all_gather_into_tensor(everyone, mine)
        return everyone.view(self.world, 2).tolist()

    def finish(self, latents: Tensor, peaks: list[list[int]]) -> None:
        """Rank 0: keeps the latents, decodes them, writes the video and, last, the result."""
        from ..wan.vae import decode_frames, load_vae
        from ..wan.video import VideoWriter

        sampling = self.job.sampling
        if not latents.isfinite().all():
            raise JobError(
                "the denoised latents are not finite; with mixed_precision fp16 try bf16, otherwise the weights are "
                "damaged or made for another model"
            )
        samples = denormalise(latents[None], latents.shape[0]).cpu().contiguous()
        partial = self.folder.latents.with_suffix(".tmp")
        save_file({"samples": samples}, partial)
        os.replace(partial, self.folder.latents)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with self.phase("decode"):
            vae = load_vae([file.path for file in self.job.model.vae], dtype=self.vae_dtype(), device=self.device)
            frames = 0
            self.files.progress("decode", 0, sampling.num_frames)
            with VideoWriter(
                self.folder.video, width=sampling.width, height=sampling.height, fps=sampling.fps
            ) as video:
                for part in decode_frames(vae, latents[None]):
                    video.write(part)
                    frames += part.shape[1]
                    self.files.progress("decode", frames, sampling.num_frames)
                self.files.progress("write", 0, 0)
        if frames != sampling.num_frames:
            raise JobError(f"the VAE made {frames} frames; the job asks for {sampling.num_frames}")
        if self.device.type == "cuda":
            peaks[0][0] = torch.cuda.max_memory_allocated(self.device)
        result = {
            "id": self.job.id,
            "version": VERSION,
            "latents": {"shape": list(samples.shape), "dtype": "float32"},
            "video": {"width": sampling.width, "height": sampling.height, "frames": frames, "fps": sampling.fps},
            "phases": self.phase_seconds,
            "step_seconds": self.step_seconds,
            "peak_gpu_bytes": [gpu for gpu, _ in peaks],
            "peak_rss_bytes": [host for _, host in peaks],
            "settings": self.settings(),
            "warnings": list(self.job.warnings),
        }
        self.folder.write_json(self.folder.result, result)

    def settings(self) -> dict[str, str | int | float | bool]:
        """What was in effect, for the status."""
        parallel, sampling = self.job.parallel, self.job.sampling
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "device": f"{self.world} x {device}",
            "sequence parallel": f"Ulysses, {parallel.ulysses_engine}" if parallel.use_ulysses else "off",
            "fsdp": parallel.use_fsdp and self.world > 1,
            "offload": parallel.offload_model,
            "memory optimization": parallel.memory_optimization,
            "compiled": parallel.torch_compile,
            "precision": f"{parallel.mixed_precision}, VAE {str(self.vae_dtype()).removeprefix('torch.')}",
            "attention": f"{self.kernel.name} ({self.kernel.reason})",
            "solver": f"{sampling.solver}, {sampling.steps} steps, shift {sampling.shift:g}",
            "guidance": f"{sampling.guidance_high:g} high, {sampling.guidance_low:g} low",
            "torch": torch.__version__,
        }

    def vae_dtype(self) -> torch.dtype:
        """bfloat16 decodes three times as fast on a GPU; fp16 and fp32 jobs, and CPUs, decode as the official code."""
        fast = self.device.type == "cuda" and self.job.parallel.mixed_precision == "bf16"
        return torch.bfloat16 if fast else torch.float32

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        log.info("phase %s", name)
        self.files.progress(name, 0, 0)
        start = time.perf_counter()
        yield
        self.phase_seconds[name] = time.perf_counter() - start
        log.info("phase %s took %.2f s", name, self.phase_seconds[name])


def _device(job: Job) -> torch.device:
    if not job.parallel.gpu_ids:
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available() or torch.cuda.device_count() <= local_rank:
        raise JobError(
            f"GPUs {', '.join(job.parallel.gpu_ids)} were chosen, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}; the driver may be too old for this torch"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
