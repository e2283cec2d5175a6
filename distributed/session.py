"""What a rank holds while it runs: its device, its place among the ranks, and the models it has loaded."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from ..wan.attention import AttentionKernel, choose_kernel
from ..wan.denoise import HIGH_NOISE, LOW_NOISE
from ..wan.linear import check_precision
from ..wan.model import WanModel
from ..wan.ops import check_kernels
from ..wan.preview import PreviewMap, preview_of_vae
from ..wan.vae import load_vae
from .experts import COMPUTE_DTYPES, Weights, load_expert, relora_expert
from .groupdir import GroupDir
from .hosts.hostfile import HostsDir
from .job import FileIdentity, Job, JobError, LoraFile
from .mesh import Mesh, init_mesh
from .parallelize import set_shard
from .sequence import SequenceShard
from .vae import RankVae

log = logging.getLogger(__name__)

EXPERTS = (HIGH_NOISE, LOW_NOISE)
OnTensor = Callable[[str, int, int], None]
"""(message, tensors read, tensors in all), called while weights are loaded."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What an expert was made from."""

    files: tuple[FileIdentity, ...]
    loras: tuple[LoraFile, ...]


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
    mesh: Mesh | None = None
    models: dict[str, WanModel] = field(default_factory=dict)
    """Expert name -> model."""
    weights: dict[str, Weights] = field(default_factory=dict)
    """Expert name -> its weights, which can be parked in host memory."""
    _loaded: dict[str, _Loaded] = field(default_factory=dict)
    _joined: bool = False
    _vae: RankVae | None = None
    _preview_map: PreviewMap | None = None

    @classmethod
    def of(cls, job: Job) -> Session:
        """For this process. Raises JobError if it is not one of the job's ranks, or sees no such GPU."""
        world = int(os.environ["WORLD_SIZE"])
        if world != job.parallel.gpu_count:
            raise JobError(f"WORLD_SIZE is {world}; the job was written for {job.parallel.gpu_count}")
        device = _device(job)
        parallel = job.parallel
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        try:
            kernel = choose_kernel(capability, COMPUTE_DTYPES[parallel.mixed_precision], parallel.attention)
            check_precision(capability, parallel.linear_precision)
            check_kernels(capability, parallel.kernels)
        except ValueError as error:
            raise JobError(str(error)) from error
        log.info("attention kernel %s: %s", kernel.name, kernel.reason)
        return cls(rank=int(os.environ["RANK"]), world=world, device=device, kernel=kernel)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all ranks."""
        return None if self.mesh is None else self.mesh.group

    def begin(self, job: Job, group: GroupDir) -> None:
        """Before each job. The first time it meets the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        if self._joined:
            return
        self._joined = True
        self.mesh = init_mesh(
            rank=self.rank,
            world=self.world,
            cfg=job.parallel.cfg_size,
            device=self.device,
            store_file=group.process_group,
            master_port=job.parallel.master_port,
            published=HostsDir(group.path).store if job.parallel.hosts else None,
            # Behind the launcher's own time-outs: it sees all ranks, and so which of them the others wait for.
            timeout=max(job.parallel.start_timeout, job.parallel.stall_timeout) + 60,
        )

    def memory(self) -> str:
        """For a line of the log: what is in use on the GPU now, and at most so far."""
        if self.device.type != "cuda":
            return ""
        now, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return f", GPU memory {now / 2**30:.2f} GiB, peak {most / 2**30:.2f} GiB"

    def leave(self) -> None:
        """A gloo process that exits inside its group may abort."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def load_experts(self, names: list[str], job: Job, shard: SequenceShard, on_tensor: OnTensor) -> None:
        """Loads the experts that the schedule runs, in its order; what a job before has loaded stays.

        Files that are not the job's are let go first. With other LoRAs or strengths only the weights that they change
        are read again: adding a difference to rounded weights would not give what a fresh start gives.
        """
        wanted = {name: _Loaded(getattr(job.model, name), getattr(job.model, f"{name}_loras")) for name in EXPERTS}
        for name in [name for name, loaded in self._loaded.items() if loaded.files != wanted[name].files]:
            self._drop(name)
        stale = [name for name in names if self._loaded.get(name) != wanted[name]]
        # One core per rank, or a video that is not decoded, would only wait for it.
        meanwhile = _import_diffusers if job.decode and self.device.type == "cuda" else _nothing
        # The one that runs first is read last, so that it is the one on the device.
        for index, name in enumerate(reversed(stale)):

            def report(done: int, total: int, name: str = name, index: int = index) -> None:
                on_tensor(f"{name} expert", index * total + done, total * len(stale))

            if job.parallel.parks_experts:
                for other in set(self.weights) - {name}:
                    self.weights[other].park()
            paths = [file.path for file in wanted[name].files]
            loras = [(lora.file.path, lora.strength) for lora in wanted[name].loras]
            if name in self.models:
                before = [lora.file.path for lora in self._loaded.pop(name).loras]
                with self.weights[name].writable():
                    changed = relora_expert(
                        self.models[name], paths, before, loras, device=self.device, expert=name, on_tensor=report
                    )
                if not changed:
                    self._drop(name)
            if name not in self.models:
                self.models[name] = load_expert(
                    paths, loras,
                    parallel=job.parallel, mesh=self.mesh, shard=shard, device=self.device,
                    expert=name, attention=self.kernel.run, on_tensor=report, meanwhile=meanwhile,
                    on_weights=partial(self.weights.__setitem__, name),
                )  # fmt: skip
            self._loaded[name] = wanted[name]
        for name in names:
            log.debug("%s expert: %s", name, "loaded now" if name in stale else "kept from the job before")
            set_shard(self.models[name], shard)

    def _drop(self, name: str) -> None:
        # Not left to the garbage collector: FSDP's hooks and the model refer to each other.
        self.weights.pop(name).drop()
        del self.models[name]
        self._loaded.pop(name, None)

    def rest(self) -> None:
        """After each job: gives back what only that job needed."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def drop_experts(self) -> None:
        """Frees their memory."""
        for name in list(self.models):
            self._drop(name)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def vae(self, job: Job) -> RankVae:
        """The VAE, loaded on first use and split over the ranks."""
        if self._vae is None:
            files = [file.path for file in job.model.vae]
            self._vae = RankVae(files, dtype=self.vae_dtype(job), device=self.device, group=self.group)
        return self._vae

    def preview_map(self, job: Job) -> PreviewMap:
        """How latents look, fitted on first use. Not collective: for the rank that shows them."""
        if self._preview_map is None:
            # A VAE of its own, dropped at once: the calls of the split one are collective, and it would stay.
            files = [file.path for file in job.model.vae]
            self._preview_map = preview_of_vae(load_vae(files, dtype=self.vae_dtype(job), device=self.device))
        return self._preview_map

    def vae_dtype(self, job: Job) -> torch.dtype:
        """bfloat16 decodes three times as fast on a GPU; fp16 and fp32 jobs, and CPUs, decode as the official code."""
        fast = self.device.type == "cuda" and job.parallel.mixed_precision == "bf16"
        return torch.bfloat16 if fast else torch.float32


def _nothing() -> None: ...


def _import_diffusers() -> None:
    """Seconds of imports for the solver and the VAE, which the reading of the weights leaves time for.

    On the main thread: Python cannot import modules that need each other on two threads at once.
    """
    importlib.import_module("diffusers.models.autoencoders.autoencoder_kl_wan")


def _device(job: Job) -> torch.device:
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
