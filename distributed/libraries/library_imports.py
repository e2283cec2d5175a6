"""The import of diffusers, without the packages that it would load for no other reason than that they are installed."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MODULES = (
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
)
"""What a rank uses of it: the VAE and the solvers."""
OPTIONAL = (
    "accelerate", "bitsandbytes", "flax", "jax", "nvidia_modelopt", "onnx", "onnxruntime", "optimum", "peft", "scipy",
    "sklearn", "tensorflow", "torchao", "transformers",
)  # fmt: skip
"""Packages that it makes use of where they are, none of it by a rank: on a machine that had them all they took four of
its five seconds, at the start of every video."""


def import_diffusers() -> None:
    """Imports `MODULES`; nothing if they are imported. On the main thread, as no two threads can import what needs each
    other."""
    if all(name in sys.modules for name in MODULES):
        return
    # The first import looks once and for all for what is installed: what a solver's has found must not be gone now.
    with hidden(() if "diffusers" in sys.modules else OPTIONAL), uncollected():
        for name in MODULES:
            importlib.import_module(name)


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
