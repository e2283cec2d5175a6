"""The GPUs that a job is planned for, as they are now."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...distributed.job.job import Parallel
from ..host import host, warm
from ..host.status import Status
from ..settings.spread import AS_SET, DistributedConfig

if TYPE_CHECKING:
    from ...distributed.machine.gpus import Gpu
    from ...distributed.machine.topology import Topology
    from ...distributed.planning.gpu_memory import Workload
    from ...distributed.planning.plan import Plan
    from ...distributed.planning.policies import Request

WORTH_TELLING = 1 << 30
"""Bytes of a GPU that ComfyUI keeps."""
USUALLY_FREE = 0.95
"""Of a GPU's memory, when no job is on it: each ComfyUI keeps a little."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What there is for a job."""

    gpus: tuple[Gpu, ...]
    """Those that it may use, the free ones first; what ComfyUI and idle groups hold counts as free."""
    taken: dict[str, str]
    """Index -> who has the GPU: a job of another ComfyUI, which this one would wait for."""
    host_bytes: int | None
    """Of host memory; None: not known."""
    kept: tuple[str, ...] = ()
    """What ComfyUI keeps of them nevertheless, in sentences."""

    def plan(self, work: Workload, request: Request) -> Plan:
        """As make_plan; where nothing fits, with the GPUs as they are once the jobs of others on them have ended.

        Raises:
            DoesNotFit: with what would fit.
        """
        from ...distributed.planning.plan import DoesNotFit, make_plan

        make = functools.partial(make_plan, work, request, links=_links(), host_bytes=self.host_bytes)
        try:
            made = make(self.gpus)
            return dataclasses.replace(made, reasons=(*made.reasons, *self.kept))
        except DoesNotFit as error:
            if not self.taken:
                raise DoesNotFit(". ".join([str(error), *self.kept]), error.size) from error
        made = make([self._once_free(gpu) for gpu in self.gpus])
        waits = [f"GPU {index} is in use by {self.taken[index]}: the job waits for it"
                 for index in made.parallel.gpu_ids if index in self.taken]  # fmt: skip
        return dataclasses.replace(made, reasons=(*made.reasons, *self.kept, *waits))

    def _once_free(self, gpu: Gpu) -> Gpu:
        if gpu.index not in self.taken:
            return gpu
        return dataclasses.replace(gpu, free_bytes=max(gpu.free_bytes, int(gpu.total_bytes * USUALLY_FREE)))


def ground_for(chosen: DistributedConfig, *, side_by_side: int = 1) -> Ground | str:
    """What there is; or why there is nothing to plan with, so that the switches are taken as they are.

    Args:
        side_by_side: jobs that share this machine's memory.
    Raises:
        ValueError: the GPUs that the config asks for are not there.
    """
    from ...distributed.machine.gpu_locks import holder
    from ...distributed.machine.gpus import suitable_gpus

    if chosen.plan == AS_SET:
        return "plan is 'as set': the switches are taken as they are"
    if chosen.hosts:
        return "the job runs on several machines: the switches are taken as they are"
    # What ComfyUI itself holds is not in the job's way.
    host.free_memory()
    gpus = suitable_gpus(chosen.gpu_count, chosen.gpu_ids, host.visible_gpus())
    if not gpus:
        return "there is no GPU, whose memory would be the limit: the switches are taken as they are"
    if not all(gpu.total_bytes for gpu in gpus):
        return (
            "nvidia-smi does not tell the memory of every GPU (MIG, unified memory): the switches are taken as they are"
        )
    gpus = warm.pool().without_idle(gpus)
    taken = {gpu.index: who for gpu in gpus if (who := holder(gpu.index))}
    gpus.sort(key=lambda gpu: gpu.index in taken)
    host_bytes = warm.pool().host_bytes()
    return Ground(tuple(gpus), taken, None if host_bytes is None else host_bytes // side_by_side, _kept(gpus))


def _kept(gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """What this process' torch still has of each, as of packs that keep models out of ComfyUI's sight."""
    import torch

    if not torch.cuda.is_initialized():
        return ()
    sizes = {
        f"GPU-{torch.cuda.get_device_properties(number).uuid}": torch.cuda.memory_reserved(number)
        for number in range(torch.cuda.device_count())
    }
    return tuple(
        f"ComfyUI keeps {size / 2**30:.1f} GiB of GPU {gpu.index} although it was asked to let them go: unload what "
        "another pack has loaded there, or leave that GPU out with gpu_ids"
        for gpu in gpus
        if (size := sizes.get(gpu.uuid, 0)) >= WORTH_TELLING
    )


def as_switched(chosen: DistributedConfig, base: Parallel, *, guided: bool) -> Parallel:
    """The config's switches as they are, on the first of the suitable GPUs of this machine.

    Args:
        base: what it says beside the GPUs.
        guided: whether every step has an unconditional pass.
    """
    from ...distributed.machine.gpus import choose_gpus

    gpu_count, gpu_ids = choose_gpus(chosen.gpu_count, chosen.gpu_ids, host.visible_gpus())
    cfg_parallel = chosen.cfg_parallel == "on"
    if chosen.cfg_parallel == "auto":
        # With both ways of sharing work off the user is asked what is meant, not served with a third.
        shares = chosen.use_ulysses or chosen.use_fsdp
        cfg_parallel = shares and gpu_count % 2 == 0 and guided
    return dataclasses.replace(base, gpu_count=gpu_count, gpu_ids=gpu_ids, cfg_parallel=cfg_parallel)


def shown(plan: Plan, status: Status) -> Parallel:
    """The plan's layout; the log and the status are told of it."""
    status.plan = plan.block()
    host.log(status.plan)
    return plan.parallel


def _links() -> Topology:
    """Unknown ones where nvidia-smi does not tell."""
    from ...distributed.machine.nvidia_smi import FAILURES
    from ...distributed.machine.topology import Topology

    try:
        return _fixed_links()
    except FAILURES:
        return Topology({})


@functools.cache
def _fixed_links() -> Topology:
    """They stay as they are while ComfyUI runs. What is raised is not kept: the next job asks again."""
    from ...distributed.machine.topology import ask_topology

    return ask_topology()
