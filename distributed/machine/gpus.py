"""The machine's GPUs, by nvidia-smi: asking CUDA would make a context on each of them."""

from __future__ import annotations

from dataclasses import dataclass

from ...wan.files.headers import brief
from ..job.errors import check
from ..job.job import MAX_GPUS
from . import nvidia_smi

MAX_CPU_PROCESSES = 8
"""Without a GPU a job runs on CPU processes; more than this helps nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One physical GPU."""

    index: str
    uuid: str
    name: str
    total_bytes: int
    """0 where nvidia-smi does not tell: of a MIG slice, or a GPU that shares the host's memory."""
    free_bytes: int

    def __str__(self) -> str:
        if not self.total_bytes:
            return f"{self.index} {self.name} (memory unknown)"
        return f"{self.index} {self.name} ({self.free_bytes / 2**30:.0f} of {self.total_bytes / 2**30:.0f} GiB free)"


def list_gpus() -> list[Gpu]:
    """Every GPU of the machine; none where nvidia-smi is missing or fails."""
    try:
        lines = nvidia_smi.query("gpu", "index", "uuid", "name", "memory.total", "memory.free")
    except nvidia_smi.FAILURES:
        return []
    gpus = []
    for values in lines:
        if len(values) == 5 and values[0].isdecimal():
            index, uuid, name, *sizes = values
            total, free = (int(size) << 20 if size.isdecimal() else 0 for size in sizes)
            gpus.append(Gpu(index=index, uuid=uuid, name=name, total_bytes=total, free_bytes=free))
    return gpus


def compute_capabilities() -> dict[str, tuple[int, int]]:
    """Index and UUID of each GPU -> its compute capability; without those of which nvidia-smi does not tell it."""
    try:
        lines = nvidia_smi.query("gpu", "index", "uuid", "compute_cap")
    except nvidia_smi.FAILURES:
        return {}
    found: dict[str, tuple[int, int]] = {}
    for values in lines:
        major, _, minor = values[-1].partition(".")
        if len(values) == 3 and major.isdecimal() and minor.isdecimal():
            found[values[0]] = found[values[1]] = int(major), int(minor)
    return found


def choose_gpus(gpu_count: int, gpu_ids: str = "", visible: str | None = None) -> tuple[int, tuple[str, ...]]:
    """Which GPUs a job runs on: the first of the suitable ones.

    Arguments and errors are those of `suitable_gpus`.

    Returns:
        processes, and one physical id per process (none on a machine without a GPU).
    """
    chosen = suitable_gpus(gpu_count, gpu_ids, visible)
    if not chosen:
        return max(gpu_count, 1), ()
    chosen = chosen[: gpu_count or len(chosen)]
    return len(chosen), tuple(gpu.index for gpu in chosen)


def suitable_gpus(gpu_count: int, gpu_ids: str = "", visible: str | None = None) -> list[Gpu]:
    """The GPUs that `gpu_count` may be chosen from; none on a machine without a GPU.

    Args:
        gpu_count: 0 for all suitable ones: those of at least half the memory of the largest.
        gpu_ids: "0,2" or UUIDs to choose from; empty for all visible ones.
        visible: the user's CUDA_VISIBLE_DEVICES; None for no limit.
    Raises:
        ValueError: naming what was asked for and what there is.
    """
    if not 0 <= gpu_count <= MAX_GPUS:
        raise ValueError(f"gpu_count is {brief(gpu_count)}; it must be 0 (all) to {MAX_GPUS}")
    present = list_gpus()
    gpus = _visible(present, visible)
    if present and not gpus and visible not in ("", "-1"):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which names none of: {'; '.join(map(str, present))}. Correct it, "
            "or set it to -1 to run on CPU processes"
        )
    wanted = split_gpu_ids(gpu_ids)
    if not gpus:
        if wanted:
            raise ValueError(
                f"gpu_ids is {brief(gpu_ids)}, but no GPU was found (nvidia-smi lists none); leave it empty"
            )
        if gpu_count > MAX_CPU_PROCESSES:
            raise ValueError(
                f"gpu_count is {gpu_count}; without a GPU it must be 1 to {MAX_CPU_PROCESSES} CPU processes"
            )
        return []
    listed = "; ".join(map(str, gpus))
    # Without a word from the user, a small one beside large ones is left alone: every rank takes the same share.
    largest = max(gpu.total_bytes for gpu in gpus)
    chosen = gpus if gpu_count else [gpu for gpu in gpus if gpu.total_bytes >= largest / 2]
    if wanted:
        chosen = [gpu for part in wanted for gpu in gpus if part in (gpu.index, gpu.uuid)]
        if len(chosen) != len(wanted) or len(set(wanted)) != len(wanted):
            raise ValueError(f"gpu_ids is {brief(gpu_ids)}; it must name different GPUs of: {listed}")
        if gpu_count > len(chosen):
            raise ValueError(f"gpu_count is {gpu_count}, but gpu_ids names {len(chosen)}: {brief(gpu_ids)}")
    if gpu_count > len(chosen):
        raise ValueError(f"gpu_count is {gpu_count}; it must be 1 to {len(chosen)}. The GPUs are: {listed}")
    return chosen


def split_gpu_ids(gpu_ids: str) -> list[str]:
    """The GPUs of "0,2". Raises ValueError for more of them than a job has."""
    ids = [part.strip() for part in gpu_ids.split(",") if part.strip()]
    check(len(ids) <= MAX_GPUS, "gpu_ids", gpu_ids, f"at most {MAX_GPUS} GPUs")
    return ids


def _visible(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    if visible is None:
        return gpus
    shown = []
    # As CUDA reads the variable: in its order, up to the first entry that is no GPU.
    for part in visible.split(","):
        name = part.strip()
        if name.startswith("MIG-"):
            # A slice of a GPU, which the listing does not have; CUDA takes its name as it is.
            shown.append(Gpu(index=name, uuid=name, name="MIG slice", total_bytes=0, free_bytes=0))
            continue
        match = [gpu for gpu in gpus if name and (gpu.index == name or gpu.uuid.startswith(name))]
        if not match:
            break
        shown.append(match[0])
    return shown
