"""How a job runs: planned for the GPUs that there are, or as the switches say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...distributed.job.job import ModelFiles, Parallel, Sampling
from ..host import host, warm
from ..host.status import Status
from ..settings.spread import AS_SET, DistributedConfig
from ..sockets.video_inputs import VideoInputs

if TYPE_CHECKING:
    from ...distributed.machine.gpus import Gpu
    from ...distributed.machine.topology import Topology
    from ...distributed.planning.gpu_memory import Workload
    from ...distributed.planning.plan import Plan
    from ...distributed.planning.policies import Request
    from ...wan.model.variants import Variant

USUALLY_FREE = 0.95
"""Of a GPU's memory, when no job is on it: each ComfyUI keeps a little."""


def planned(
    asked: VideoInputs,
    literal: Callable[[], Parallel],
    model: ModelFiles,
    sampling: Sampling,
    *,
    variant: Variant,
    encodes_text: bool,
    status: Status,
) -> tuple[Parallel, Sampling]:
    """The layout of the job and, where dynamic_resolution lowers it, its size. The status gets the plan.

    Args:
        literal: the switches as they are.
        variant: of the model.
        encodes_text: the job runs the text encoder.
    Raises:
        ValueError: the video does not fit; the message says what would.
    """
    from ...distributed.machine.gpu_locks import holder
    from ...distributed.machine.gpus import suitable_gpus
    from ...distributed.planning.plan import DoesNotFit, as_set
    from ...distributed.planning.workload import workload_of

    chosen, dynamic = asked.config, asked.dynamic_resolution
    here = chosen.plan != AS_SET and not chosen.hosts
    if here:
        # What ComfyUI itself holds is not in the job's way.
        host.free_memory()
    gpus = suitable_gpus(chosen.gpu_count, chosen.gpu_ids, host.visible_gpus()) if here else []
    reason = _unplanned(chosen, [gpu.total_bytes for gpu in gpus])
    if reason is not None:
        if dynamic:
            status.note(f"dynamic_resolution had no effect: {reason}")
        return _shown(as_set(literal(), reason), status), sampling
    gpus = warm.pool().without_idle(gpus)
    # Of jobs of another ComfyUI, which this one would wait for.
    taken = {gpu.index: who for gpu in gpus if (who := holder(gpu.index))}
    gpus.sort(key=lambda gpu: gpu.index in taken)
    request = _request(asked, model, sampling)
    image = asked.start_image is not None
    sized = asked.samples is not None or asked.image_embeds is not None
    work = workload_of(
        model,
        sampling,
        request.base,
        encodes_text=encodes_text,
        given_frames=variant.known_frames and image,
        decode=asked.decode_video or image,
    )
    host_bytes = warm.pool().host_bytes()
    share = None if host_bytes is None else host_bytes // asked.side_by_side
    plan = functools.partial(_plan_waiting, request=request, gpus=gpus, taken=taken, links=_links(), host_bytes=share)
    try:
        made = plan(work)
    except DoesNotFit as error:
        # Latents that are given have a size of their own.
        if not dynamic or error.size is None or sized:
            raise
        width, height = error.size
        made = plan(dataclasses.replace(work, width=width, height=height))
        status.note(
            f"dynamic_resolution lowered the video from {sampling.width}x{sampling.height} to {width}x{height}, the "
            "largest that fits"
        )
        sampling = dataclasses.replace(sampling, width=width, height=height)
    return _shown(made, status), sampling


def _plan_waiting(
    work: Workload, request: Request, gpus: Sequence[Gpu], *, taken: Mapping[str, str], **machine: Any
) -> Plan:
    """As make_plan; where nothing fits, with the GPUs as they are once the jobs of others on them have ended.

    Args:
        taken: index -> who has the GPU.
    """
    from ...distributed.planning.plan import DoesNotFit, make_plan

    try:
        return make_plan(work, request, gpus, **machine)
    except DoesNotFit:
        if not taken:
            raise
    later = [
        dataclasses.replace(gpu, free_bytes=max(gpu.free_bytes, int(gpu.total_bytes * USUALLY_FREE)))
        if gpu.index in taken
        else gpu
        for gpu in gpus
    ]
    made = make_plan(work, request, later, **machine)
    waits = [f"GPU {index} is in use by {taken[index]}: the job waits for it" for index in made.parallel.gpu_ids
             if index in taken]  # fmt: skip
    return dataclasses.replace(made, reasons=(*made.reasons, *waits))


def _unplanned(chosen: DistributedConfig, total_bytes: list[int]) -> str | None:
    """Why the switches are taken as they are, or None."""
    if chosen.plan == AS_SET:
        return "plan is 'as set': the switches are taken as they are"
    if chosen.hosts:
        return "the job runs on several machines: the switches are taken as they are"
    if not total_bytes:
        return "there is no GPU, whose memory would be the limit: the switches are taken as they are"
    if not all(total_bytes):
        return (
            "nvidia-smi does not tell the memory of every GPU (MIG, unified memory): the switches are taken as they are"
        )
    return None


def _request(asked: VideoInputs, model: ModelFiles, sampling: Sampling) -> Request:
    from ...distributed.planning.policies import Request
    from ...distributed.planning.preflight import always_guided

    return Request(
        base=asked.parallel(),
        gpu_count=asked.config.gpu_count,
        cfg_parallel=asked.config.cfg_parallel,
        always_guided=always_guided(model, sampling),
    )


def _shown(plan: Plan, status: Status) -> Parallel:
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
