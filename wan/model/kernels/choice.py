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
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels is 'triton', but the package triton is not installed; choose 'plain' or install it")
    lacking = _lacks_for_launchers()
    if lacking:
        raise ValueError(
            f"kernels is 'triton', which needs {lacking} to start its kernels; choose 'plain' or install it"
        )


def _start_triton() -> None:
    """Compiles what Triton asks the GPU with: it needs the driver's library and a cache folder that can be written."""
    from triton.runtime import driver

    driver.active.get_current_target()


def _lacks_for_launchers() -> str:
    """What Triton's `runtime.build` would not find, at the first kernel and so after the weights; empty: nothing."""
    if sys.platform != "linux":
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for what users install has no headers.
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    return "" if header.is_file() else f"Python's headers ({header})"


OPS: dict[str, Callable[[], Ops]] = {"plain": _plain, "triton": _triton}
