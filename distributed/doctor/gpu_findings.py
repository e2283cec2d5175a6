"""What nvidia-smi and the pack's own locks say of the GPUs. Makes no CUDA context."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from ..job.errors import JobCancelled, JobError
from ..machine import nvidia_smi
from ..machine.gpu_locks import GpuLocks, wait_for_gpus
from ..machine.gpus import Gpu, choose_gpus, list_gpus
from ..machine.topology import NVLINK, read_peer_access, read_topology
from . import exchange
from .findings import NOTE, WRONG, Finding

LITTLE_FREE = 0.5
"""Share of a GPU's memory below which what is free is worth a word."""
SLOW = 5.0
"""GB/s between two GPUs below which sharing work hardly pays."""


def driver_findings() -> list[Finding]:
    """The driver, or why there is none to talk to."""
    try:
        lines = nvidia_smi.query("gpu", "driver_version")
    except FileNotFoundError:
        return [Finding("driver", "nvidia-smi is not there: no NVIDIA driver. Jobs run on CPU processes, slowly", NOTE)]
    except subprocess.TimeoutExpired as error:
        remedy = "The driver hangs: look at dmesg for Xid, end what uses the GPUs, or restart the machine"
        return [Finding("driver", f"nvidia-smi did not answer within {error.timeout:g} s", WRONG, remedy)]
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip() or f"exit code {error.returncode}"
        remedy = "Repair the NVIDIA driver; after an update the machine must be restarted"
        return [Finding("driver", f"nvidia-smi fails: {said}", WRONG, remedy)]
    except OSError as error:
        return [Finding("driver", f"nvidia-smi cannot be started: {error.strerror}", WRONG, "Repair the NVIDIA driver")]
    versions = sorted({values[0] for values in lines if values[0]})
    return [Finding("driver", f"NVIDIA {', '.join(versions)}")] if versions else []


def gpu_findings() -> list[Finding]:
    """Each GPU's memory, who uses it, and what connects them."""
    gpus = list_gpus()
    if not gpus:
        return [Finding("GPUs", "none found; jobs run on CPU processes, which is meant for trying things out", NOTE)]
    found = [_memory(gpu) for gpu in gpus]
    users = _users()
    found += [Finding(f"GPU {gpu.index}", f"used by {user}") for gpu in gpus for user in users.get(gpu.uuid, [])]
    if len(gpus) == 1:
        text = (
            "one GPU: there is nobody to share work with. Jobs still run in a process of their own, with offloading, "
            "quantised files, resumable failures and batches"
        )
        return [*found, Finding("GPUs", text, NOTE)]
    return [*found, *_links(gpus)]


def exchange_findings(folder: Path | None = None) -> list[Finding]:
    """Times an all-reduce between two GPUs that no job of this pack is using, or two CPU processes without a GPU.

    Args:
        folder: of the GPUs' locks; None for the machine's own.
    """
    topic = "exchange"
    try:
        gpus = choose_gpus(0, "", os.environ.get("CUDA_VISIBLE_DEVICES"))[1]
    except ValueError as error:
        return [Finding(topic, str(error), WRONG)]
    if len(gpus) == 1 or sys.platform != "linux":
        return []
    if any(gpu.startswith("MIG-") for gpu in gpus):
        return [Finding(topic, "MIG slices cannot share a video: set gpu_count, or gpus_per_video, to 1", NOTE)]
    taken: dict[str, GpuLocks] = {}
    busy: list[str] = []
    try:
        for gpu in gpus:
            locks = _take(gpu, busy, folder)
            if locks is not None:
                taken[gpu] = locks
            if len(taken) == exchange.RANKS:
                break
        ids = list(taken)
        if gpus and len(ids) < exchange.RANKS:
            return [Finding(topic, f"not tried: {'; '.join(busy)}", NOTE, "Ask again when the GPUs are free")]
        found = exchange.measure(ids)
    finally:
        for locks in taken.values():
            locks.release()
    who = f"GPU {' and '.join(ids)}" if ids else "two CPU processes (gloo)"
    notes = [Finding("locks", text, NOTE) for text in busy]
    return [*notes, _judge(found, topic, who, gpu=bool(ids))]


def _judge(found: exchange.Exchange, topic: str, who: str, *, gpu: bool) -> Finding:
    if found.cure:
        text = f"{who}: {found.problem}; with {found.cure} it works, {found.gigabytes_per_second:.1f} GB/s"
        return Finding(topic, text, WRONG, f"Start ComfyUI with {found.cure} in its environment")
    if found.out_of_memory:
        remedy = "End what uses these GPUs, have ComfyUI free its memory, and ask again"
        return Finding(topic, f"{who}: not known, {found.problem}", NOTE, remedy)
    if found.problem:
        tried = " (nor with " + " or ".join("=".join(cure) for cure in exchange.CURES) + ")" if gpu else ""
        remedy = "Set NCCL_DEBUG=INFO and run the doctor again; in a container give it --ipc=host" if gpu else ""
        return Finding(topic, f"{who}: {found.problem}{tried}", WRONG, remedy)
    assert found.gigabytes_per_second is not None
    text = f"{who}: all-reduce at {found.gigabytes_per_second:.1f} GB/s"
    if gpu and found.gigabytes_per_second < SLOW:
        remedy = "Prefer cfg_parallel, which exchanges least, and GPUs that share a PCIe switch or NVLink"
        return Finding(topic, f"{text}, which is slow", NOTE, remedy)
    return Finding(topic, text)


def _memory(gpu: Gpu) -> Finding:
    if gpu.total_bytes and gpu.free_bytes < LITTLE_FREE * gpu.total_bytes:
        return Finding(f"GPU {gpu.index}", str(gpu), NOTE, "End the programs that use it, or leave it out with gpu_ids")
    return Finding(f"GPU {gpu.index}", str(gpu))


def _users() -> dict[str, list[str]]:
    """GPU's UUID -> its processes, as far as nvidia-smi sees them: in a container often none."""
    try:
        lines = nvidia_smi.query("compute-apps", "gpu_uuid", "pid", "process_name", "used_memory")
    except nvidia_smi.FAILURES:
        return {}
    found: dict[str, list[str]] = {}
    for values in lines:
        if len(values) >= 4 and values[1].isdecimal():
            memory = f", {int(values[-1]) / 1024:.1f} GiB" if values[-1].isdecimal() else ""
            found.setdefault(values[0], []).append(f"process {values[1]} ({','.join(values[2:-1])}{memory})")
    return found


def _links(gpus: Sequence[Gpu]) -> list[Finding]:
    topology, access = read_topology(), read_peer_access()
    pairs = [(a.index, b.index) for a, b in combinations(gpus, 2)]
    by_kind: dict[str, list[str]] = {}
    for a, b in pairs:
        by_kind.setdefault(topology.link(a, b), []).append(f"{a}-{b}")
    text = "; ".join(f"{kind}: {_some(names, len(pairs))}" for kind, names in by_kind.items())
    found = [Finding("links", text)]
    refused = [f"{a}-{b}" for a, b in pairs if access.get((a, b), "OK") != "OK"]
    if refused:
        # No fault: consumer GPUs are sold without it, and NCCL goes through host memory.
        remedy = "NCCL goes through host memory then; prefer cfg_parallel. If exchanges hang, NCCL_P2P_DISABLE=1 helps"
        level = NOTE if NVLINK not in by_kind else WRONG
        found.append(Finding("peer to peer", f"not possible between {_some(refused, len(pairs))}", level, remedy))
    elif access:
        found.append(Finding("peer to peer", "possible between all GPUs"))
    return found


def _some(names: Sequence[str], of: int, shown: int = 8) -> str:
    if len(names) == of > 1:
        return "all pairs"
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _take(gpu: str, busy: list[str], folder: Path | None) -> GpuLocks | None:
    """The GPU's lock if it is free; otherwise says in `busy` who has it."""
    told: list[str] = []
    try:
        return wait_for_gpus([gpu], cancelled=lambda: True, on_wait=told.append, folder=folder)
    except JobCancelled:
        busy += [line.removeprefix("waiting for ") for line in told]
    except JobError as error:
        busy.append(str(error))
    return None
