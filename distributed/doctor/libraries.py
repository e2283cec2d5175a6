"""Of what only an import tells: torch, attention kernels, the model. Runs in a process of its own, which may crash or
hang, and prints each finding as one line of JSON when it has it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..job.needs import refused_values
from ..machine.gpus import compute_capabilities
from .findings import NOTE, OK, WRONG, Finding


def main(arguments: Sequence[str]) -> int:
    """Arguments: none, or the file, the folder or the shards of a transformer."""
    for finding in _findings(arguments):
        print(json.dumps(dataclasses.asdict(finding)), flush=True)
    return 0


def _findings(model: Sequence[str]) -> Iterator[Finding]:
    try:
        import torch
    # Whatever a broken installation raises.
    except Exception as error:
        yield Finding("torch", f"cannot be imported: {error}", WRONG, "Install torch again")
        return
    cuda = torch.version.cuda
    nccl = ""
    if cuda and torch.cuda.is_available():
        nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield Finding("torch", f"{torch.__version__}, CUDA {cuda or 'none'}{nccl}")
    # Not by torch, which would make a context on each GPU.
    capabilities = sorted(compute_capabilities().values())
    if capabilities and not (cuda and torch.cuda.is_available()):
        reason = "this torch is built without CUDA" if not cuda else "torch sees no GPU, though nvidia-smi does"
        remedy = "Install a torch for CUDA that the driver supports" if not cuda else "Update the NVIDIA driver"
        yield Finding("torch and GPUs", reason, WRONG, remedy)
    elif capabilities:
        yield from architecture_findings(capabilities, torch.cuda.get_arch_list())
    yield from _kernel_findings(bool(capabilities))
    yield from switch_findings(capabilities)
    if model:
        yield from model_findings(model)


def architecture_findings(capabilities: Sequence[tuple[int, int]], built: Sequence[str]) -> Iterator[Finding]:
    """Whether torch has code for these GPUs.

    Args:
        capabilities: compute capability of each GPU.
        built: torch's list: sm_90 runs on GPUs of the same first digit from there up, compute_90 on all from there up.
    """
    for major, minor in sorted(set(capabilities)):
        if not any(_runs(name, major, minor) for name in built):
            text = f"torch has no code for GPUs of compute capability {major}.{minor}, only for {', '.join(built)}"
            remedy = "Install a torch for a newer CUDA" if major >= 10 else "Install an older torch"
            yield Finding("torch and GPUs", text, WRONG, remedy)


def _runs(name: str, major: int, minor: int) -> bool:
    kind, _, digits = name.partition("_")
    # sm_90a and sm_100f are of one architecture alone, but a torch that has them has its plain code, too.
    number = int(digits.rstrip("af") or 0)
    if kind == "compute":
        return number <= major * 10 + minor
    return number // 10 == major and number % 10 <= minor


def _kernel_findings(gpu: bool) -> Iterator[Finding]:
    """Each package that brings an attention kernel: imported, for most are built for one torch and fail with others."""
    from ...wan.model.attention_kernels import KERNELS

    yield Finding("attention", "torch's own kernels are always there")
    for package, module in {kernel.package: kernel.module for kernel in KERNELS.values() if kernel.module}.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                yield Finding(package, "not installed (optional)")
                continue
            yield _broken(package, error, gpu)
        # Whatever a broken installation raises.
        except Exception as error:
            yield _broken(package, error, gpu)
        else:
            yield Finding(package, "installed, can be imported")


def switch_findings(capabilities: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """Which values of the switches cannot run, and why, on each kind of GPU.

    Args:
        capabilities: compute capability of each GPU; empty without one.
    """
    kinds: list[tuple[int, int] | None] = [*sorted(set(capabilities))] or [None]
    for capability in kinds:
        number = ".".join(map(str, capability or ()))
        where = f", on compute capability {number}" if len(kinds) > 1 else ""
        reasons: dict[str, list[str]] = {}
        for (name, value), message in refused_values(capability).items():
            # "attention is 'fa3', which needs a GPU; here it may be auto, cpu": what may be chosen instead is left out.
            reason = re.split(r"; |\. ", message.partition(", which ")[2])[0]
            reasons.setdefault(reason, []).append(name if value is True else f"{name} {value}")
        listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        yield Finding("switches", f"cannot run here{where}: {listed or 'none'}")


def _broken(package: str, error: Exception, gpu: bool) -> Finding:
    # "auto" takes what is installed, so on a GPU a job may meet the same error.
    return Finding(
        package,
        f"installed, but cannot be imported: {error}",
        WRONG if gpu else NOTE,
        f"Install the {package} that was built for this torch, or remove it",
    )


def model_findings(model: Sequence[str]) -> Iterator[Finding]:
    """How many GPUs suit a model.

    Args:
        model: a transformer's file or shards, its folder, or a folder with a `transformer` in it.
    """
    from ...wan.checkpoint.checkpoint import Checkpoint
    from ...wan.files.model_folder import folder_files

    folders = [path / "transformer" if (path / "transformer").is_dir() else path for path in map(Path, model)]
    try:
        checkpoint = Checkpoint([file for path in folders for file in folder_files(path, "a Wan2.2 transformer")])
    except (ValueError, OSError) as error:
        yield Finding("model", str(error), WRONG, "Choose the file or folder of a Wan2.2 transformer")
        return
    yield heads_finding(checkpoint.label, checkpoint.config.num_heads)


def heads_finding(label: str, heads: int) -> Finding:
    """Which numbers of GPUs share a model's heads evenly."""
    even = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    text = (
        f"{label}: {heads} heads. GPUs that share one video evenly: {even}; twice as many with cfg_parallel. "
        "Other numbers work at the pace of the GPU with most heads, but not with ulysses_engine deepspeed"
    )
    return Finding("model", text, OK)
