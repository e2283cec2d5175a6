"""What each switch needs of a machine: the only place that knows it.

The preflight, each machine of a hostfile, the doctor and the ranks ask here: none refuses what another lets pass.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from ...wan.model.attention_kernels import Capability, choose_kernel
from ...wan.model.kernels.choice import check_compiling, check_kernels
from ...wan.model.precisions import TORCH_NAMES, check_precision
from .job import Parallel
from .setting import Choice, setting_of
from .switches import Switches


def check_needs(parallel: Parallel, capability: Capability | None) -> None:
    """Raises ValueError with the first switch that cannot run, in this process' installation.

    `ulysses_engine` symmetric is not among them: where GPUs cannot reach each other's memory it sends the same bits
    through the host's, or as packed does, and the status says so.

    Args:
        capability: compute capability of the GPU; None without one.
    """
    choose_kernel(capability, TORCH_NAMES[parallel.mixed_precision], parallel.attention)
    check_precision(capability, parallel.linear_precision)
    check_kernels(capability, parallel.kernels)
    if parallel.torch_compile:
        check_compiling(capability)
    if parallel.exchange == "deepspeed" and not deepspeed_there():
        raise ValueError(
            f"ulysses_engine is 'deepspeed', which is not installed; choose 'packed', or run {DEEPSPEED_COMMAND}"
        )


DEEPSPEED_COMMAND = f"{sys.executable} -m pip install --no-build-isolation deepspeed"


def deepspeed_there() -> bool:
    """Whether the optional package is installed: an exchange is its, and the launcher for several machines."""
    return importlib.util.find_spec("deepspeed") is not None


def every_value() -> Iterator[tuple[str, Any]]:
    """Each switch with each value that it may have; not the numbers, which need nothing of a machine."""
    for field in dataclasses.fields(Switches):
        setting = setting_of(Switches, field.name)
        if isinstance(setting, Choice):
            yield from ((field.name, name) for name in setting.names)
        elif isinstance(field.default, bool):
            yield from ((field.name, value) for value in (False, True))


def refused_values(capability: Capability | None) -> dict[tuple[str, Any], str]:
    """The switch and the value -> why it cannot run, where several ranks make a video; all others can."""
    found = {}
    for name, value in every_value():
        # Without Ulysses something else has to share the work.
        parallel = Parallel(gpu_count=2, use_fsdp=(name, value) == ("use_ulysses", False))
        try:
            check_needs(dataclasses.replace(parallel, **{name: value}), capability)
        except ValueError as error:
            found[name, value] = str(error)
    return found
