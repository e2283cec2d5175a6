"""What of ComfyUI's environment the agent and the ranks get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wan_pack.distributed.group import environment
from wan_pack.distributed.group.environment import NAMES, PREFIXES, SECRETS, child_environment
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.machine.processes import GROUP_VARIABLE

STRANGERS = (
    "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_SESSION", "AZURE_CLIENT_ID",
    "GOOGLE_APPLICATION_CREDENTIALS", "GCP_KEY", "GITHUB_ACTIONS", "GITLAB_USER", "CI_JOB_JWT", "KUBECONFIG",
    "DOCKER_HOST", "VAULT_ADDR", "NPM_CONFIG_REGISTRY", "PIP_INDEX_URL", "SSH_AUTH_SOCK", "SSH_ASKPASS",
    "GPG_AGENT_INFO", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "XAUTHORITY", "COOKIE", "SESSION_ID", "WANDB_API",
    "WANDB_NAME", "MLFLOW_TRACKING_URI", "COMET_WORKSPACE", "CIVITAI_KEY", "HF_ENDPOINT", "HUGGINGFACE_HUB_CACHE",
    "OPENAI_ORG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "DATABASE_URL", "PGPASSFILE", "REDIS_URL",
    "SENTRY_DSN", "LD_PRELOAD", "LD_AUDIT", "GCONV_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONINSPECT",
    "PYTHONBREAKPOINT", "PYTHON_EXEC", "BASH_ENV", "ENV", "PERL5LIB", "IFS", "SHELLOPTS", "PET_NNODES",
    "PET_RDZV_ENDPOINT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
    "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMI_RANK", "COMFYUI_PATH", "COMFY_CLOUD", "EDITOR", "PAGER",
)  # fmt: skip
"""Of clouds, services, desktops, schedulers and shells: no rank needs them."""


def child(source: dict[str, str], folder: Path = Path("/group"), **settings: object) -> dict[str, str]:
    return child_environment(Parallel(**{"gpu_count": 2, **settings}), folder, source)


SET = set(child({}))
"""Names that are set whatever ComfyUI has."""


@pytest.mark.parametrize("name", STRANGERS)
def test_fault_25_a_variable_that_no_rank_needs_stays_out(name: str):
    assert set(child({name: "x"})) == SET


@pytest.mark.parametrize("name", sorted(NAMES) + [f"{prefix}X" for prefix in PREFIXES])
def test_what_ranks_need_gets_in_unless_it_may_be_a_secret(name: str):
    assert child({name: "mine"})[name] == "mine"
    for word in SECRETS:
        assert f"{name}_{word}" not in child({f"{name}_{word}": "mine"})


def test_what_a_rank_cannot_do_without_is_named():
    """Libraries, the compiler's caches, the user's own switches of torch and NCCL."""
    for name in (
        "PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "CC", "VIRTUAL_ENV", "XDG_CACHE_HOME",
        "LC_ALL", "NVIDIA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE", "GLOO_TIMEOUT", "OMP_PROC_BIND", "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS", "TORCH_LOGS", "TORCHINDUCTOR_FX_GRAPH_CACHE", "TRITON_PTXAS_PATH",
        "PYTORCH_NVML_BASED_CUDA_CHECK", "DS_ACCELERATOR", "PYTHONDONTWRITEBYTECODE",
    ):  # fmt: skip
        assert child({name: "mine"})[name] == "mine"


def test_secrets_are_told_by_a_word_anywhere_in_the_name():
    for name in ("NCCL_TOKEN_FILE", "TORCH_SECRET", "DS_PASSWORD_2", "OMP_API_KEY"):
        assert name not in child({name: "x"})


def test_the_users_own_choices_win_over_defaults_and_never_over_what_a_group_needs(tmp_path: Path):
    source = {
        "OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "4", "NCCL_SOCKET_IFNAME": "eth0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "PYTHONNOUSERSITE": "1", "CUDA_VISIBLE_DEVICES": "7",
    }  # fmt: skip
    got = child(source, tmp_path, gpu_ids=("4", "1"))
    assert (got["OMP_NUM_THREADS"], got["TORCHINDUCTOR_COMPILE_THREADS"], got["PYTHONNOUSERSITE"]) == ("3", "4", "1")
    assert got["NCCL_SOCKET_IFNAME"] == got["GLOO_SOCKET_IFNAME"] == "lo"
    assert got["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert got["CUDA_VISIBLE_DEVICES"] == "4,1" and got["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert got[GROUP_VARIABLE] == str(tmp_path)
    assert got["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl_trace_rank_"
    assert got["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == got["HF_HUB_OFFLINE"] == got["PYTHONUNBUFFERED"] == "1"
    assert got["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and got["TOKENIZERS_PARALLELISM"] == "false"
    assert int(got["TORCH_FR_BUFFER_SIZE"]) >= 1000


def test_processes_share_the_processors_of_their_own_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    assert child({}, gpu_count=4)["OMP_NUM_THREADS"] == "8"
    assert child({}, gpu_count=8, hosts=("a", "b"))["OMP_NUM_THREADS"] == "8"
    monkeypatch.setattr(os, "cpu_count", lambda: 31)
    assert child({}, gpu_count=4)["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert child({}, gpu_count=2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert child({}, gpu_count=4)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_one_option_of_the_allocator_is_taken_out(name: str):
    """ComfyUI's own: it makes NCCL run out of memory. The user's others stay."""
    kept = {"expandable_segments:True": "expandable_segments:True", "backend:native": "backend:native", "": None,
            "backend:cudaMallocAsync": None, " backend: cudaMallocAsync ,": None,
            "backend:cudaMallocAsync,max_split_size_mb:64": "max_split_size_mb:64"}  # fmt: skip
    for value, expected in kept.items():
        assert child({name: value}).get(name) == expected


@pytest.mark.parametrize(
    ("version", "old"), [("2.7.0+cu126", True), ("2.8.1", True), ("2.9.0", False), ("2.15.0", False), (None, False)]
)
def test_an_old_torch_is_told_under_the_names_that_it_knows(
    version: str | None, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers = () if version is None else tuple(map(int, version.split("+")[0].split(".")[:2]))
    monkeypatch.setattr(environment, "torch_release", lambda: (version or "", numbers))
    got = child({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, tmp_path)
    for name, before in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
        ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    ):
        assert got.get(before) == (got[name] if old else None)
    # The user's own value of the old name stays.
    both = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert child(both)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_compiled_kernels_stay_in_the_users_cache():
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    assert [child({"HOME": "/h"})[name] for name in names] == [
        "/h/.cache/wan-distributed/inductor", "/h/.cache/wan-distributed/triton"
    ]  # fmt: skip
    assert child({"HOME": "/h", "XDG_CACHE_HOME": "/c"})[names[0]] == "/c/wan-distributed/inductor"
    assert child({"HOME": "/h", names[0]: "/mine"})[names[0]] == "/mine"
    assert not set(names) & set(child({}))


def test_cache_is_in_the_users_cache_folder(tmp_path: Path):
    name = "TORCHINDUCTOR_CACHE_DIR"

    def of(**source: str) -> str | None:
        return child_environment(Parallel(gpu_count=1), tmp_path, source).get(name)

    assert of(HOME="/home/a") == "/home/a/.cache/wan-distributed/inductor"
    assert of(HOME="/home/a", XDG_CACHE_HOME="/fast") == "/fast/wan-distributed/inductor"
    assert of(HOME="/home/a", TORCHINDUCTOR_CACHE_DIR="/mine") == "/mine"
    assert of() is None


def test_python_keeps_what_it_compiles_where_comfyui_keeps_nothing(tmp_path: Path):
    """Container images set the variable; torch, diffusers and transformers would be compiled by every process."""
    off = {"PYTHONDONTWRITEBYTECODE": "1"}

    def of(**source: str) -> dict[str, str]:
        child = child_environment(Parallel(gpu_count=1), tmp_path, source)
        return {name: value for name, value in child.items() if name in (*off, "PYTHONPYCACHEPREFIX")}

    assert of(HOME="/home/a", **off) == {"PYTHONPYCACHEPREFIX": "/home/a/.cache/wan-distributed/pycache"}
    assert of(HOME="/home/a", **off, PYTHONPYCACHEPREFIX="/mine") == {"PYTHONPYCACHEPREFIX": "/mine"}
    assert of(HOME="/home/a") == {}
    # With nowhere to keep it, it is as the user has it.
    assert of(**off) == off
