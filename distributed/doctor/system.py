"""Memory, disks, versions and variables of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..group.environment import ALLOCATOR
from ..group.installation import installation_problem
from ..job.errors import JobError
from ..machine.host_memory import read_sizes
from ..machine.pack_folder import REMEDY, folder_problem
from ..machine.prerequisites import ffmpeg_problem, require_platform, torch_problem, writing_problem
from .findings import NOTE, OK, WRONG, Finding

LITTLE_DISK = 2 << 30
LITTLE_MEMORY = 16 << 30
LITTLE_SHARED = 512 << 20
"""Docker gives 64 MiB, which NCCL's buffers between a few GPUs exceed."""
LIBRARIES = ("diffusers", "transformers", "safetensors", "gguf", "imageio-ffmpeg", "deepspeed", "triton")
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""A container's own limit, by control groups of version 2 and 1."""
VARIABLES: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "CUDA_LAUNCH_BLOCKING": (lambda value: value not in ("", "0"), "every kernel is waited for: unset it, for speed"),
    "NCCL_P2P_DISABLE": (lambda value: value == "1", "GPUs exchange through host memory: slow where they have NVLink"),
    "NCCL_SHM_DISABLE": (lambda value: value == "1", "GPUs exchange through sockets, the slowest way"),
    "NCCL_NVLS_ENABLE": (
        lambda value: value not in ("", "0", "2"),
        "NVLink multicast is forced, which fails on machines that are shared: unset it",
    ),
    "NCCL_ALGO": (bool, "NCCL may not choose its algorithm: unset it"),
    "NCCL_PROTO": (bool, "NCCL may not choose its protocol: unset it"),
}
"""Name -> when its value hurts, and how. Those that jobs get anyway; the others are kept from them."""


def version_findings() -> list[Finding]:
    """System, Python and packages."""
    found = [Finding("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}")]
    try:
        require_platform()
    except JobError as error:
        found.append(Finding("platform", str(error), WRONG, "Run ComfyUI on Linux, or in WSL2"))
    versions = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    found.append(Finding("packages", versions))
    if problem := torch_problem():
        found.append(Finding("torch", problem, WRONG))
    return found


def folder_findings(name: str) -> list[Finding]:
    """Of the pack's own folder, by its name; videos are made in any."""
    problem = folder_problem(name)
    return [Finding("folder", problem, NOTE, REMEDY)] if problem else []


def package_findings() -> list[Finding]:
    """Whether the processes of a job can import what they need: all of it, as a rank does and in its environment."""
    problem = installation_problem()
    words = problem or "the processes of a job can import all that they need"
    return [Finding("imports", words, WRONG if problem else OK)]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def ffmpeg_findings() -> list[Finding]:
    """Whether a video can be written."""
    problem = ffmpeg_problem()
    return [Finding("ffmpeg", problem or "encodes H.264", WRONG if problem else OK)]


def disk_findings(folders: Mapping[str, Path]) -> list[Finding]:
    """Free space in each folder, and whether files can be made there.

    Args:
        folders: what it is for -> an existing folder.
    """
    found = []
    for topic, folder in folders.items():
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            found.append(Finding(topic, f"{folder}: {error.strerror}", WRONG, "Create it, or choose another folder"))
            continue
        text = f"{folder}: {free / 2**30:.1f} GiB free"
        problem = writing_problem(folder)
        if problem:
            found.append(Finding(topic, problem, WRONG))
        elif free < LITTLE_DISK:
            found.append(Finding(topic, text, NOTE, "Free some space: long videos may not fit"))
        else:
            found.append(Finding(topic, text))
    return found


def memory_findings(gpus: int, shared: Path = Path("/dev/shm")) -> list[Finding]:
    """Host memory, shared memory and the limit for locked pages.

    Args:
        gpus: how many the machine has.
        shared: where shared memory is mounted.
    """
    found = []
    try:
        sizes = read_sizes()
    except OSError:
        sizes = {}
    if "MemTotal" in sizes:
        total, available = sizes["MemTotal"], sizes.get("MemAvailable", 0)
        limit = min(_limits(), default=total)
        text = f"{available / 2**30:.0f} of {total / 2**30:.0f} GiB available"
        if limit < total:
            text += f"; this container may use {limit / 2**30:.0f} GiB"
        little = min(available, limit) < LITTLE_MEMORY
        remedy = "offload_model and block streaming keep weights there: leave them off, or add memory"
        found.append(Finding("host memory", text, NOTE if little else OK, remedy if little else ""))
    if shared.is_dir():
        size = shutil.disk_usage(shared)
        text = f"{shared}: {size.free / 2**30:.2f} of {size.total / 2**30:.2f} GiB free"
        if size.free < LITTLE_SHARED and gpus > 1:
            remedy = "NCCL needs more for several GPUs: start the container with --shm-size=8g or --ipc=host"
            found.append(Finding("shared memory", text, WRONG, remedy))
        else:
            found.append(Finding("shared memory", text))
    if sys.platform == "linux":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        words = "no limit" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
        found.append(Finding("locked pages", f"{words} (ulimit -l); CUDA's pinned memory does not count"))
    return found


def _limits(paths: Iterable[Path] = MEMORY_LIMITS) -> list[int]:
    found = []
    for path in paths:
        try:
            found.append(int(path.read_text(encoding="ascii")))
        # "max", or no such file.
        except (OSError, ValueError):
            continue
    return found


def variable_findings(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Environment variables that slow jobs down or break them."""
    found = []
    for name in ALLOCATOR:
        if "cudaMallocAsync" in environment.get(name, ""):
            text = f"{environment[name]}: taken out for jobs, NCCL runs out of memory under it; ComfyUI keeps it"
            found.append(Finding(name, text))
    for name, (hurts, how) in VARIABLES.items():
        value = environment.get(name, "")
        if hurts(value):
            found.append(Finding(name, f"is {value}: {how}", NOTE))
    return found or [Finding("environment", "no variable that hurts")]
