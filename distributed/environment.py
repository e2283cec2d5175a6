"""The environment of a job's processes: an allowlist, so that no secret and no hijacking variable gets in.

torchrun reads PET_* and PYTHON_EXEC, torch reads RANK and MASTER_*: none of ComfyUI's may reach it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .job import Parallel

NAMES = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP",
        "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_MODULE_LOADING", "CUDA_LAUNCH_BLOCKING", "CC", "CXX",
        "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "NUMBA_CACHE_DIR",
        "IMAGEIO_FFMPEG_EXE", "SYSTEMD_EXEC_PID", "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE",
    }
)  # fmt: skip
PREFIXES = ("LC_", "NVIDIA_", "NCCL_", "GLOO_", "OMP_", "MKL_", "OPENBLAS_", "TORCHINDUCTOR_", "TRITON_", "TORCH_",
            "PYTORCH_", "DS_")  # fmt: skip
REFUSED = frozenset({"TORCHELASTIC_ERROR_FILE", "TORCH_HUB_TOKEN"})
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def child_environment(parallel: Parallel, job_folder: Path, source: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of `source` (ComfyUI's environment) the agent and the ranks get, and what is set for them."""
    kept = {
        name: value
        for name, value in source.items()
        if (name in NAMES or name.startswith(PREFIXES)) and name not in REFUSED and "TOKEN" not in name
    }
    for name in ALLOCATOR:
        if name in kept:
            # ComfyUI asks for cudaMallocAsync, under which NCCL's all-to-all runs out of memory.
            options = [o for o in kept.pop(name).split(",") if o and not o.strip().startswith("backend:")]
            if options:
                kept[name] = ",".join(options)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel.gpu_count)),
        # Compile workers would be grandchildren that a kill does not reach at once.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(parallel.gpu_ids),
        # One host: no traffic, and no listener, outside of it.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(job_folder / "nccl_trace_rank_"),
    }
    return {**defaults, **kept, **fixed}
