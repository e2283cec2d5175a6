"""Which implementation of `wan.model.ops` computes the arithmetic. A new one is one entry in `OPS`.

Loads without torch: its names are those of a job's `kernels` and of the node's choices.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..ops import Ops


AUTOMATIC = ((9, 0),)
"""The GPUs on which "auto" takes the fused kernels: where they were measured."""


def _plain() -> Ops:
    from ..ops import PLAIN

    return PLAIN


def _triton() -> Ops:
    from .fused import triton_ops

    return triton_ops()


def choose_ops(capability: tuple[int, int] | None, wanted: str = "auto", *, compiled: bool = False) -> tuple[str, str]:
    """The implementation named `wanted`, or for "auto" the fastest by what was measured.

    Args:
        capability: of the GPU; None without one.
        compiled: torch.compile makes kernels of its own of the plain ones.
    Returns:
        a name in `OPS`, and why it was chosen.
    Raises:
        ValueError: `wanted` cannot run there.
    """
    if wanted != "auto":
        check_kernels(capability, wanted)
        return wanted, "as asked"
    if compiled:
        return "plain", "torch.compile makes kernels of it"
    if capability not in AUTOMATIC:
        return "plain", "no GPU" if capability is None else "others are measured on Hopper only"
    try:
        check_kernels(capability, "triton")
        _start_triton()
    except Exception as error:  # whatever keeps Triton from running: there is another way
        return "plain", f"{type(error).__name__}: {error}"
    return "triton", "fused, the fastest measured on Hopper"


def check_kernels(capability: tuple[int, int] | None, name: str) -> None:
    """Raises ValueError if the implementation cannot run on a GPU of that compute capability (None: no GPU)."""
    if name != "triton":
        return
    if capability is None:
        raise ValueError("kernels is 'triton', which needs a GPU; choose 'plain'")
    if lacking := _lacks_for_triton():
        raise ValueError(
            f"kernels is 'triton', which needs {lacking} to start its kernels; choose 'plain' or install it"
        )


def check_compiling(capability: tuple[int, int] | None) -> None:
    """Raises ValueError if torch.compile cannot make kernels for such a GPU, or for the CPU (None)."""
    lacking = _lacks_for_triton() if capability else _lacks(("CXX",), ("g++",), "a C++ compiler (g++)")
    if lacking:
        raise ValueError(f"torch_compile is on, which needs {lacking} to make its kernels; turn it off or install it")


def _lacks_for_triton() -> str:
    """What its launchers are built from, which it would miss at the first kernel and so after the weights; empty:
    nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    return _lacks(("CC",), ("gcc", "clang"), "a C compiler (gcc or clang)")


def _start_triton() -> None:
    """Compiles what Triton asks the GPU with: it needs the driver's library and a cache folder that can be written."""
    from triton.runtime import driver

    driver.active.get_current_target()


def _lacks(variables: tuple[str, ...], programs: tuple[str, ...], compiler: str) -> str:
    """What compiling for Python lacks here: a compiler, named by a variable or found, or Python's headers."""
    if sys.platform != "linux":
        return ""
    if not (any(map(os.environ.get, variables)) or any(map(shutil.which, programs))):
        return compiler
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for what users install has no headers.
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    return "" if header.is_file() else f"Python's headers ({header})"


OPS: dict[str, Callable[[], Ops]] = {"plain": _plain, "triton": _triton}
