"""Chooses how a job runs: which GPUs, how they share the work, where the weights are.

Every way that the user's switches allow (policies.py) is priced in bytes (memory.py); the fastest that fits runs. More
memory only adds ways that fit, so it never leads to a slower one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

from ..job.errors import SHOWN_AS
from ..job.job import Parallel
from ..machine.gpus import Gpu
from .gpu_memory import GIB, Estimate, Workload, estimate, parked_bytes
from .policies import LINK_BYTES, Request, intrusion, levels, policies, seconds

MAX_SIDE = 8192
MAX_FRAMES = 4097
"""The job's own limits."""
FREE_STEP = GIB // 4
"""Free memory is rounded down to this, so that a few MiB more or less do not change a plan."""
HOST_SHARE = 0.9
"""Of the host's available memory that weights may wait in."""
MORE_GPUS = 0.15
"""The times are rough: one more GPU of n counts as this share of 1 / n faster than computed."""
MAX_COMBINED = 8
"""GPUs among which every combination is tried; beyond, those with the most free memory."""


class Links(Protocol):
    """What connects GPUs: see topology.py."""

    def link(self, index_a: str, index_b: str, /) -> str:
        """nvlink, pcie, host or unknown."""


class DoesNotFit(ValueError):
    """The job needs more memory than there is in any way that is allowed."""

    __module__ = SHOWN_AS

    def __init__(self, message: str, size: tuple[int, int] | None) -> None:
        super().__init__(message)
        self.size = size
        """Width and height of the largest that fits, if any does."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a job runs, and why."""

    parallel: Parallel
    reasons: tuple[str, ...]
    """Short sentences."""
    gpus: tuple[Gpu, ...] = ()
    estimate: Estimate | None = None
    """For the fullest GPU; None where memory was not looked at."""
    size: tuple[int, int] | None = None
    """The largest of the same aspect ratio and number of frames."""
    num_frames: int | None = None
    """The most at the same size."""
    seconds: float = 0.0
    """Of the denoising, a rough figure that plans are ranked by."""
    level: int = 0
    """How far it goes beyond switches that are off (`policies.levels`)."""

    def block(self) -> str:
        """A few lines for the log and the status."""
        parallel = self.parallel
        lines = [f"plan: {_layout(parallel)}; {_weights(parallel)}"]
        if self.estimate is not None:
            parts = {field.name: getattr(self.estimate, field.name) for field in dataclasses.fields(self.estimate)}
            listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= GIB / 20)
            free = min(gpu.free_bytes for gpu in self.gpus)
            lines.append(f"memory: about {self.estimate.total / GIB:.1f} of {free / GIB:.1f} GiB free ({listed})")
        if self.size is not None and self.num_frames is not None:
            lines.append(f"would fit: up to {self.size[0]}x{self.size[1]}, or up to {self.num_frames} frames")
        return "\n".join([*lines, *(f"because {reason}" for reason in self.reasons)])


def as_set(parallel: Parallel, reason: str) -> Plan:
    """The switches taken literally."""
    return Plan(parallel, (reason,))


def make_plan(
    work: Workload, request: Request, gpus: Sequence[Gpu], links: Links, *, host_bytes: int | None = None
) -> Plan:
    """The fastest way to run `work` that fits.

    Args:
        gpus: to choose from, in the order in which equal ones are taken.
        host_bytes: memory of the host that is available; None if that is not known.
    Raises:
        DoesNotFit: with the largest size and the most frames that would.
        ValueError: no number of GPUs goes with the settings.
    """
    assert gpus and all(gpu.total_bytes for gpu in gpus), gpus
    gpus = [dataclasses.replace(gpu, free_bytes=gpu.free_bytes // FREE_STEP * FREE_STEP) for gpu in gpus]
    counts = [request.gpu_count] if request.gpu_count else range(1, len(gpus) + 1)
    allowed = {count: policies(work, request, count) for count in counts}
    if not any(allowed.values()):
        raise ValueError(
            f"no number of GPUs from {counts[0]} to {counts[-1]} goes with cfg_parallel {request.cfg_parallel}, "
            f"use_ulysses {request.base.use_ulysses}, use_fsdp {request.base.use_fsdp} and ulysses_engine "
            f"{request.base.ulysses_engine}; change one of them"
        )
    host = None if host_bytes is None else int(host_bytes * HOST_SHARE)
    free = sorted((gpu.free_bytes for gpu in gpus), reverse=True)

    # Those that need least are the last.
    every = [way for ways in allowed.values() for way in ways][::-1]

    def fits(other: Workload, way: Parallel) -> bool:
        return _fits(other, way, free[way.gpu_count - 1], host)

    best: tuple[tuple[object, ...], int, float, Parallel, tuple[Gpu, ...]] | None = None
    for count, ways in allowed.items():
        needs = [(parallel, estimate(work, parallel, 0).total) for parallel in ways if _in_host(work, parallel, host)]
        for chosen in _choices(gpus, count, links):
            least = min(gpu.free_bytes for gpu in chosen)
            link = _slowest(chosen, links)
            found = []
            for parallel in (parallel for parallel, need in needs if need <= least):
                groups = [chosen[i : i + parallel.ulysses_size] for i in range(0, count, parallel.ulysses_size)]
                ulysses_link = min((_slowest(group, links) for group in groups), key=LINK_BYTES.__getitem__)
                found.append((parallel, seconds(work, parallel, ulysses_link, link)))
            for level, (parallel, time) in zip(levels(found, request.base, link), found, strict=True):
                # Of equally fast ones that which touches least, on the first GPUs.
                key = (*_rank(level, parallel, time), parallel.memory_optimization, parallel.offload_model,
                       parallel.stream_blocks, parallel.use_fsdp, [gpus.index(gpu) for gpu in chosen])  # fmt: skip
                if best is None or key < best[0]:
                    best = key, level, time, parallel, chosen
    size, frames = _largest_size(work, every, fits), _most_frames(work, every, fits)
    if best is None:
        raise _does_not_fit(work, allowed, free, host, size, frames)
    _, level, time, parallel, chosen = best
    parallel = dataclasses.replace(parallel, gpu_ids=tuple(gpu.index for gpu in chosen))
    reasons = tuple(_reasons(work, request, parallel, level, chosen, gpus, links))
    needed = estimate(work, parallel, min(gpu.free_bytes for gpu in chosen))
    return Plan(parallel, reasons, chosen, needed, size, frames, time, level)


def rank(plan: Plan) -> tuple[int, float]:
    """Lower is better: what the planner minimises."""
    return _rank(plan.level, plan.parallel, plan.seconds)


def _rank(level: int, parallel: Parallel, time: float) -> tuple[int, float]:
    return level, time * parallel.gpu_count**-MORE_GPUS


def _in_host(work: Workload, parallel: Parallel, host: int | None) -> bool:
    return host is None or parked_bytes(work, parallel) <= host


def _fits(work: Workload, parallel: Parallel, free: int, host: int | None) -> bool:
    return _in_host(work, parallel, host) and estimate(work, parallel, free).total <= free


def _choices(gpus: Sequence[Gpu], count: int, links: Links) -> Iterable[tuple[Gpu, ...]]:
    """GPUs to use together, well-connected ones next to each other: neighbours share a sequence."""
    if len(gpus) > MAX_COMBINED:
        gpus = sorted(gpus, key=lambda gpu: -gpu.free_bytes)[:count]
    for chosen in combinations(gpus, count):
        order, rest = [chosen[0]], list(chosen[1:])
        while rest:
            rest.sort(key=lambda gpu: -LINK_BYTES[links.link(order[-1].index, gpu.index)])
            order.append(rest.pop(0))
        yield tuple(order)


def _slowest(gpus: Sequence[Gpu], links: Links) -> str:
    found = (links.link(a.index, b.index) for a, b in combinations(gpus, 2))
    return min(found, key=LINK_BYTES.__getitem__, default="nvlink")


def _largest_size(
    work: Workload, ways: Sequence[Parallel], fits: Callable[[Workload, Parallel], bool]
) -> tuple[int, int] | None:
    """Of the same aspect ratio, by the shorter side in tokens."""
    multiple, short = work.latents.pixel_multiple, min(work.width, work.height)

    def sized(tokens: int) -> Workload:
        scale = tokens * multiple / short
        width, height = (max(round(side * scale / multiple), 1) * multiple for side in (work.width, work.height))
        return dataclasses.replace(work, width=width, height=height)

    most = MAX_SIDE * short // max(work.width, work.height) // multiple
    tokens = _last(ways, lambda n, way: fits(sized(n), way), most)
    return None if tokens == 0 else (sized(tokens).width, sized(tokens).height)


def _most_frames(work: Workload, ways: Sequence[Parallel], fits: Callable[[Workload, Parallel], bool]) -> int | None:
    """4n + 1, at the same size."""
    most = (MAX_FRAMES + 3) // 4
    count = _last(ways, lambda n, way: fits(dataclasses.replace(work, num_frames=4 * n - 3), way), most)
    return None if count == 0 else 4 * count - 3


def _last(ways: Sequence[Parallel], good: Callable[[int, Parallel], bool], most: int) -> int:
    """The last of 1 to `most` that is good in some way; 0 if none is. In each way all that come before it are good."""
    last = 0
    for way in ways:
        # Most are no better than one before them, which takes one look.
        if last == most or not good(last + 1, way):
            continue
        low, high = last + 1, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if good(middle, way) else (low, middle - 1)
        last = low
    return last


def _does_not_fit(
    work: Workload, allowed: dict[int, list[Parallel]], free: list[int], host: int | None,
    size: tuple[int, int] | None, frames: int | None,
) -> DoesNotFit:  # fmt: skip
    ways = [way for listed in allowed.values() for way in listed]
    held = [way for way in ways if _in_host(work, way, host)]
    way = min(held or ways, key=lambda way: estimate(work, way, 0).total - free[way.gpu_count - 1])
    needed, left = estimate(work, way, 0).total, free[way.gpu_count - 1]
    where = "the GPU" if way.gpu_count == 1 else f"each of {way.gpu_count} GPUs"
    text = (
        f"{work.width}x{work.height} with {work.num_frames} frames does not fit: it needs about "
        f"{needed / GIB:.1f} GiB on {where}, where {left / GIB:.1f} GiB are free"
    )
    offers = []
    if size is not None:
        offers.append(f"{size[0]}x{size[1]} with {work.num_frames} frames")
    if frames is not None:
        offers.append(f"{work.width}x{work.height} with {frames} frames")
    # Ways that only the host's memory is too small for.
    waiting = [parked_bytes(work, way) for way in ways if _fits(work, way, free[way.gpu_count - 1], None)]
    if waiting and host is not None:
        offers.append(f"this size with {min(waiting) / GIB:.0f} GiB of host memory, of which {host / GIB:.0f} are left")
    would = f"; what fits is {' or '.join(offers)}" if offers else "; no size fits: the weights alone are too large"
    return DoesNotFit(text + would, size)


def _layout(parallel: Parallel) -> str:
    if parallel.gpu_count == 1:
        return f"GPU {parallel.gpu_ids[0]}" if parallel.gpu_ids else "one process"
    ids = f" {', '.join(parallel.gpu_ids)}" if parallel.gpu_ids else ""
    what = f"GPUs{ids}" if parallel.gpu_ids else f"{parallel.gpu_count} processes"
    ways = [f"CFG parallel {parallel.cfg_size}"] if parallel.cfg_parallel else []
    if parallel.exchange:
        ways.append(f"Ulysses {parallel.ulysses_size}")
    return f"{what} ({' x '.join(ways) or 'each the whole sequence'})"


def _weights(parallel: Parallel) -> str:
    if parallel.stream_blocks:
        text = "blocks streamed from host memory"
    elif parallel.use_fsdp and parallel.gpu_count > 1:
        text = f"weights sharded (FSDP), gathered one {parallel.gather} at a time"
    else:
        text = "weights whole on each" if parallel.gpu_count > 1 else "weights whole"
    if parallel.offload_model and not parallel.stream_blocks:
        text += ", the idle expert in host memory"
    return text + (", memory optimization" if parallel.memory_optimization else "")


def _reasons(
    work: Workload, request: Request, parallel: Parallel, level: int, chosen: Sequence[Gpu], gpus: Sequence[Gpu],
    links: Links,
) -> Iterable[str]:  # fmt: skip
    base, free = request.base, min(gpu.free_bytes for gpu in chosen)
    if not request.gpu_count and len(chosen) < len(gpus):
        few = f"more than {len(chosen)} of {len(gpus)} GPUs"
        yield f"{few} would be slower here, or need more memory than they have free"
    if len(chosen) > 1:
        yield f"the slowest link between these GPUs is {_slowest(chosen, links)}"
    if parallel.cfg_parallel and request.cfg_parallel == "auto":
        yield "guidance is over 1 at every step: each half of the GPUs computes one prompt"
    if base.ulysses_engine == "auto" and parallel.ulysses_engine == "packed" and parallel.ulysses_size > 1:
        yield "the buffers of a symmetric exchange do not fit: it is packed"
    resident = dataclasses.replace(
        parallel, use_fsdp=False, offload_model=False, stream_blocks=False,
        memory_optimization=base.memory_optimization,
    )  # fmt: skip
    need = estimate(work, resident, 0).total / GIB
    if parallel == resident:
        return
    yield f"everything on each GPU would take {need:.1f} of {free / GIB:.1f} GiB"
    if beyond := intrusion(parallel, base):
        name = "stream_blocks" if parallel.stream_blocks else "offload_model"
        why = "nothing else fits" if beyond == level else f"sharding over the {_slowest(chosen, links)} link is slower"
        yield f"{name} is off, but {why}, so it is on for this job"
    if parallel.memory_optimization and not base.memory_optimization:
        yield "memory_optimization is off, but needed here, so it is on for this job"
