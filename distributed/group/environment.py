"""The environment of a job's processes: an allowlist, so that no secret and no hijacking variable gets in.

torchrun reads PET_* and PYTHON_EXEC, torch reads RANK and MASTER_*: none of ComfyUI's may reach it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..job.job import Parallel
from ..machine import import_paths
from ..machine.prerequisites import torch_release
from ..machine.processes import GROUP_VARIABLE

NAMES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP",
        "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH", "CUDA_MODULE_LOADING", "CUDA_LAUNCH_BLOCKING",
        "CC", "CXX", "MAX_JOBS", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME", "HF_HOME", "IMAGEIO_FFMPEG_EXE",
        "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE",
    }
)  # fmt: skip
PREFIXES = (
    "LC_", "NVIDIA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "PYTORCH_",
    "DS_",
)  # fmt: skip
SECRETS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY")
RENAMED = (
    ((2, 9), "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    ((2, 9), "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
    ((2, 9), "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
)
"""The torch since which a variable has a new name, that and its old one."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def child_environment(parallel: Parallel, group_folder: Path, source: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of `source` (ComfyUI's environment) the agent and the ranks get, and what is set for them."""
    kept = {
        name: value
        for name, value in source.items()
        if (name in NAMES or name.startswith(PREFIXES)) and not any(word in name for word in SECRETS)
    }
    for name in ALLOCATOR:
        if name in kept:
            # ComfyUI asks for cudaMallocAsync, under which NCCL's all-to-all runs out of memory.
            options = [
                o for o in kept.pop(name).split(",") if "".join(o.split()) not in ("", "backend:cudaMallocAsync")
            ]
            if options:
                kept[name] = ",".join(options)
    numbers = torch_release()[1]
    renamed = {new: old for since, new, old in RENAMED if numbers and numbers < since}
    if "PYTORCH_ALLOC_CONF" in kept and "PYTORCH_ALLOC_CONF" in renamed:
        kept.setdefault("PYTORCH_CUDA_ALLOC_CONF", kept["PYTORCH_ALLOC_CONF"])
    caches = _caches(source)
    if "PYTHONPYCACHEPREFIX" in caches:
        del kept["PYTHONDONTWRITEBYTECODE"]
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel.gpus_per_host)),
        # Compile workers take host memory on every rank, and a few graphs do not keep them busy.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **caches,
    }
    fixed = {
        GROUP_VARIABLE: str(group_folder),
        import_paths.VARIABLE: import_paths.handed_on(source),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(parallel.gpu_ids),
        # No traffic, and no listener, outside of this machine; over several, hosts/host_agent.py names the interface.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # 3 leaves the group as it is, so that the flight recorder can still write what every rank was doing.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(group_folder / "nccl_trace_rank_"),
    }
    # Under the new names alone an old torch would record nothing; under both a new one complains of each.
    fixed |= {renamed[name]: value for name, value in fixed.items() if name in renamed}
    return {**defaults, **kept, **fixed}


def cache_folder(source: Mapping[str, str] = os.environ) -> Path | None:
    """Where this pack keeps what can be made again, for the user whose environment it is; None without a home."""
    caches = source.get("XDG_CACHE_HOME") or (f"{source['HOME']}/.cache" if source.get("HOME") else "")
    return Path(caches, "wan-distributed") if caches else None


def _caches(source: Mapping[str, str]) -> dict[str, str]:
    """Where compiled kernels stay for the next job: torch's own choice is the temporary folder, often emptied.

    Python's own compiled files too, where ComfyUI keeps none, as in most container images: to compile torch, diffusers
    and transformers anew took each process of each video ten seconds.
    """
    caches = cache_folder(source)
    if caches is None:
        return {}
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    if source.get("PYTHONDONTWRITEBYTECODE"):
        folders["PYTHONPYCACHEPREFIX"] = "pycache"
    return {name: str(caches / folder) for name, folder in folders.items()}
