"""The import of diffusers, without the packages that it would load for no other reason than that they are installed."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

MODULES = (
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
)
"""What a rank uses of it: the VAE and the solvers."""
OPTIONAL = (
    "accelerate", "bitsandbytes", "flax", "jax", "nvidia_modelopt", "onnx", "onnxruntime", "optimum", "peft", "scipy",
    "sklearn", "tensorflow", "torchao", "torchvision", "transformers",
)  # fmt: skip
"""Packages that it makes use of where they are, none of it by a rank: on a machine that had them all they took four of
its five seconds, at the start of every video."""
COMPILER = "torch._dynamo"
"""Two thirds of the rest, for decorators of what a rank never compiles."""


def import_diffusers() -> None:
    """Imports `MODULES`; nothing if they are imported. On the main thread, as no two threads can import what needs each
    other."""
    if all(name in sys.modules for name in MODULES):
        return
    # The first import looks once and for all for what is installed: what a solver's has found must not be gone now.
    first = "diffusers" not in sys.modules
    with hidden(OPTIONAL if first else ()), uncollected():
        try:
            with uncompiled():
                _import_modules()
        except Exception:
            # A version that needs more of the compiler than to be decorated.
            log.debug("diffusers is imported with %s:", COMPILER, exc_info=True)
            for name in [name for name in list(sys.modules) if first and name.partition(".")[0] == "diffusers"]:
                del sys.modules[name]
            _import_modules()


def _import_modules() -> None:
    for name in MODULES:
        importlib.import_module(name)


class _Absent:
    """For `sys.meta_path`: a module that the thread which made this cannot import."""

    def __init__(self, module: str) -> None:
        self._module, self._thread = module, threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self._module and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is left out for now", name=name)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Leaves torch's compiler out of what this thread imports: what it would be told not to compile stays as it is.

    Other threads can import it meanwhile. Does nothing where it is imported.
    """
    if COMPILER in sys.modules:
        yield
        return
    import torch

    def disable(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
        return (lambda decorated: decorated) if function is None else function

    absent, was = _Absent(COMPILER), torch.compiler.disable
    # Another list: a thread that imports meanwhile goes through the one that it began with.
    sys.meta_path = [absent, *sys.meta_path]
    torch.compiler.disable = disable
    try:
        yield
    finally:
        torch.compiler.disable = was
        sys.meta_path = [finder for finder in sys.meta_path if finder is not absent]


@contextmanager
def uncollected() -> Iterator[None]:
    """Has Python look for no garbage: what imports make is none, and to look through it over and over takes a third of
    their time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def hidden(names: Sequence[str]) -> Iterator[None]:
    """Makes packages that are not imported yet look as if they were not installed."""
    absent = [name for name in names if name not in sys.modules]
    # Python's own mark of a module that cannot be imported, which `find_spec` takes for one that is not there.
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
