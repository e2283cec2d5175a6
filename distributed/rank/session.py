"""What a rank holds while it runs: its device, its place among the ranks, and the models it has loaded."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ...wan.checkpoint.weights import COMPUTE_DTYPES
from ...wan.model.attention_kernels import AttentionKernel, choose_kernel
from ...wan.model.kernels.choice import choose_ops
from ...wan.model.sparse import SparseAttention, block_order, sparse_kernel, sparse_steps
from ...wan.transformer.transformer import WanModel
from ...wan.vae.autoencoder import load_vae
from ...wan.vae.preview import PreviewMap, preview_of_vae
from ...wan.vision.seen_pictures import SeenPictures
from ..group.group_folder import GroupDir
from ..job.job import GroupJob, Job, JobError, Parallel, VaeJob
from ..job.job_folder import JobDir
from ..job.needs import check_needs
from ..job.progress import Span
from ..libraries.library_imports import import_diffusers
from ..machine.memory_file import STORE_VARIABLE
from ..parallel.mesh import Mesh, init_mesh
from ..parallel.sequence import SequenceShard, gather_bytes
from ..parallel.split_vae import RankVae
from ..parallel.symmetric import let_go
from ..weights.warm_up import get_ready
from .experts import ExpertCache
from .prompts import PromptEncoder

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The job is cancelled; this process keeps what it has loaded and waits for the next one."""


@dataclass(slots=True)
class Session:
    """One rank's side of a group of processes.

    Args:
        rank, world: from torchrun's RANK and WORLD_SIZE.
        device: chosen by LOCAL_RANK among the GPUs that the job may use, or the CPU.
    """

    rank: int
    world: int
    device: torch.device
    kernel: AttentionKernel
    ops: str
    """A name in `wan.model.kernels.choice.OPS`."""
    vae_ops: str
    """A name in `wan.vae.vae_ops.VAE_OPS`."""
    mesh: Mesh | None = None
    experts: ExpertCache = field(init=False)
    prompts: PromptEncoder = field(init=False)
    pictures: SeenPictures = field(init=False)
    _computes_as: tuple[object, ...] | None = None
    """What of the last job has decided the kernels."""
    _exchange: str = ""
    """Of the last job with a transformer."""
    _joined: bool = False
    _meshes: dict[int, Mesh] = field(default_factory=dict)
    """By `cfg_size`."""
    _vae: RankVae | None = None
    _vae_made_of: tuple[object, ...] = ()
    _preview_map: PreviewMap | None = None
    _preview_of: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        self.experts = ExpertCache(self.rank, self.device, self.kernel.run, self.ops, self.kernel.exact)
        self.prompts = PromptEncoder(self.device)
        self.pictures = SeenPictures(self.device)

    @classmethod
    def of(cls, job: GroupJob) -> Session:
        """For this process. Raises JobError if it is not one of the job's ranks, or sees no such GPU."""
        world = int(os.environ["WORLD_SIZE"])
        if world != job.parallel.gpu_count:
            raise JobError(f"WORLD_SIZE is {world}; the job was written for {job.parallel.gpu_count}")
        device = _device(job)
        kernel, ops, vae_ops = _kernels(job.parallel, device)
        made = cls(rank=int(os.environ["RANK"]), world=world, device=device, kernel=kernel, ops=ops, vae_ops=vae_ops)
        made._computes_as = _what_decides(job.parallel)
        return made

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all ranks."""
        return None if self.mesh is None else self.mesh.group

    @property
    def sparse(self) -> SparseAttention | None:
        """The attention kernel, where it is sparse in some steps."""
        return self.kernel.run if isinstance(self.kernel.run, SparseAttention) else None

    def shard(self, job: GroupJob, grid: tuple[int, int, int]) -> SequenceShard:
        """This rank's part of the job's tokens, `grid` of them, before its first step."""
        length, order = math.prod(grid), None
        if self.sparse is not None and isinstance(job, Job):
            steps = job.sampling.step_range
            self.sparse.steps = sparse_steps(steps, job.sampling.schedule_steps, length)
            self.sparse.enter(steps.start)
            order = block_order(grid) if self.sparse.steps else None
        if self.mesh is None or not job.parallel.use_ulysses:
            return SequenceShard(length=length, order=order)
        return SequenceShard(length=length, rank=self.mesh.ulysses_rank, world=self.mesh.ulysses_size, order=order)

    def begin(self, job: GroupJob, group: GroupDir) -> None:
        """Before each job. The first time it meets the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        # Behind the launcher's own time-outs: it sees all ranks, and so which of them the others wait for.
        timeout = max(job.parallel.start_timeout, job.parallel.stall_timeout) + 60
        self._compute_as(job.parallel)
        if self._joined:
            # What has no transformer works with all ranks, however they are laid out.
            if job.transformer:
                self._lay_out(job.parallel, timeout)
                self._prepare(job)
            return
        self._joined = True
        self.mesh = init_mesh(
            rank=self.rank, world=self.world, cfg=job.parallel.cfg_size, device=self.device, timeout=timeout,
            store_file=Path(os.environ[STORE_VARIABLE]) if STORE_VARIABLE in os.environ else None,
            master_port=job.parallel.master_port,
            published=group.store if job.parallel.hosts or job.parallel.master_port else None,
        )  # fmt: skip
        self._remember_mesh()
        if job.transformer:
            self._exchange = job.parallel.exchange
            self._prepare(job)

    def _prepare(self, job: GroupJob) -> None:
        """What a job before has left, and this one was not planned with, is let go before it takes any memory."""
        if isinstance(job, Job):
            if not self.holds_vae(job):
                self._vae = None
            self.experts.keep_only(job.model)
        self.experts.prepare(job.parallel)
        if isinstance(job, Job) and job.parallel.parks_experts:
            # Experts that wait in host memory were planned with all of it.
            self.prompts.drop()
            self.experts.park_later()

    def _compute_as(self, parallel: Parallel) -> None:
        """Chooses the kernels, where the job before has not decided the same. Raises JobError if one cannot run."""
        decides = _what_decides(parallel)
        if decides != self._computes_as:
            self.kernel, self.ops, self.vae_ops = _kernels(parallel, self.device)
            self.experts.compute_by(self.kernel.run, self.ops, self.kernel.exact)
            self._computes_as = decides

    def _remember_mesh(self) -> None:
        if self.mesh is not None:
            self._meshes[self.mesh.cfg_size] = self.mesh

    def _lay_out(self, parallel: Parallel, timeout: float) -> None:
        """For a job that splits its prompts over other ranks than the one before, or exchanges in another way. Groups,
        once made, stay: making them is collective, and guidance goes to and fro."""
        if self.mesh is None or (self.mesh.cfg_size, self._exchange) == (parallel.cfg_size, parallel.exchange):
            return
        # The groups' memory does not: one of them would keep it from what the other needs.
        let_go(self.mesh.ulysses_group, self.device)
        self._exchange = parallel.exchange
        if self.mesh.cfg_size != parallel.cfg_size:
            known = self._meshes.get(parallel.cfg_size)
            self.mesh = known or self.mesh.laid_out(parallel.cfg_size, timedelta(seconds=timeout))
            self._remember_mesh()

    def get_ready(self, model: WanModel, job: GroupJob, shard: SequenceShard | None, span: Span) -> None:
        """As `weights.warm_up.get_ready`, which see. Collective."""
        kernel = None if self.sparse is not None else self.kernel
        get_ready(model, job.parallel, shard, mesh=self.mesh, device=self.device, kernel=kernel, span=span)

    def check_stop(self, folder: JobDir, job: GroupJob) -> None:
        """After each step, on every rank. Raises Stopped on all of them if one has seen the request by now."""
        if job.parallel.keep_warm_seconds == 0:
            return
        wanted = folder.stop.exists()
        # Each by itself would stop at another step, and wait in vain for those behind it.
        if self.mesh is not None:
            wanted = any(seen != b"\0" for seen in gather_bytes(b"\1" if wanted else b"\0", self.device))
        if wanted:
            raise Stopped

    def memory(self) -> str:
        """For a line of the log: what is in use on the GPU now, and at most so far."""
        if self.device.type != "cuda":
            return ""
        now, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return f", GPU memory {now / 2**30:.2f} GiB, peak {most / 2**30:.2f} GiB"

    def leave(self) -> None:
        """A gloo process that exits inside its group may abort."""
        self.experts.stop_reading()
        if dist.is_initialized():
            dist.destroy_process_group()

    def rest(self) -> None:
        """After each job: gives back what only that job needed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def holds_vae(self, job: Job | VaeJob) -> bool:
        """Whether the job's is loaded."""
        return self._vae is not None and self._vae_made_of == self._vae_of(job)

    def _vae_of(self, job: Job | VaeJob) -> tuple[object, ...]:
        return job.vae, self.vae_dtype(job), self.vae_ops

    def vae(self, job: Job | VaeJob) -> RankVae:
        """The VAE, loaded on first use and split over the ranks."""
        if not self.holds_vae(job):
            import_diffusers()
            self._vae = None
            dtype = self.vae_dtype(job)
            paths = [file.path for file in job.vae]
            self._vae = RankVae(paths, dtype=dtype, device=self.device, group=self.group, ops=self.vae_ops)
            self._vae_made_of = self._vae_of(job)
        assert self._vae is not None, "it is held"
        return self._vae

    def make_room(self, needed: int, *, but: str, parks: bool) -> None:
        """As `ExpertCache.make_room`. A VAE, which is read soon, goes before the models. Collective."""
        if self._vae is not None and not self.experts.has_room(needed, self.world):
            self._vae = None
        self.experts.make_room(needed, but=but, parks=parks, ranks=self.world)

    def preview_map(self, job: Job) -> PreviewMap:
        """How latents look, fitted on first use. Not collective: for the rank that shows them."""
        if self._preview_map is None or self._preview_of != self._vae_of(job):
            import_diffusers()
            # Its own VAE, gone at once: the split one's calls are collective. bfloat16 takes a CPU a tenth of the time.
            dtype = torch.bfloat16 if self.device.type == "cpu" else self.vae_dtype(job)
            vae = load_vae([file.path for file in job.vae], dtype=dtype, device=self.device)
            self._preview_map, self._preview_of = preview_of_vae(vae), self._vae_of(job)
        return self._preview_map

    def vae_dtype(self, job: GroupJob) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, job.parallel.vae_dtype)
        return dtype


def _what_decides(parallel: Parallel) -> tuple[object, ...]:
    """All that `_kernels` looks at."""
    precision, exchange = (parallel.mixed_precision, parallel.linear_precision), parallel.exchange
    return parallel.attention, parallel.sparse_tau, parallel.kernels, parallel.torch_compile, *precision, exchange


def _kernels(parallel: Parallel, device: torch.device) -> tuple[AttentionKernel, str, str]:
    """Of the attention, and the names of those between the matrix products and in the VAE. Raises JobError if what is
    asked for cannot run here."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    try:
        check_needs(parallel, capability)
        dtype = COMPUTE_DTYPES[parallel.mixed_precision]
        kernel = choose_kernel(capability, dtype, parallel.attention)
        if kernel.sparse:
            kernel = sparse_kernel(kernel, choose_kernel(capability, dtype), parallel.sparse_tau)
        if kernel.eight_bits:
            kernel = dataclasses.replace(kernel, exact=choose_kernel(capability, dtype).run)
        ops, reason = choose_ops(capability, parallel.kernels, compiled=parallel.torch_compile)
        vae_ops, _ = choose_ops(capability, parallel.kernels)
    except ValueError as error:
        raise JobError(str(error)) from error
    log.info("attention kernel %s: %s", kernel.name, kernel.reason)
    log.info("%s kernels between the matrix products: %s", ops, reason)
    return kernel, ops, vae_ops


def _device(job: GroupJob) -> torch.device:
    if not job.parallel.gpu_ids:
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available() or torch.cuda.device_count() <= local_rank:
        slices = [gpu for gpu in job.parallel.gpu_ids if gpu.startswith("MIG-")]
        reason = "the driver may be too old for this torch"
        if len(slices) > 1 and torch.cuda.is_available():
            reason = "CUDA shows a process one MIG slice only, so a job can have one: set gpu_count to 1"
        raise JobError(
            f"GPUs {', '.join(job.parallel.gpu_ids)} were chosen, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}; {reason}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
