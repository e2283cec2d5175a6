"""Which kernel computes attention between tokens, and where each can run. A new one is one entry in `KERNELS`.

Loads without torch: its names are those of a job's `attention` and of the node's choices.
"""

from __future__ import annotations

import importlib.util
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .attention import Attention

Capability = tuple[int, int]
"""A GPU's compute capability, (9, 0) for Hopper."""


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """How attention between tokens is computed, and where it can be."""

    name: str
    reason: str
    """Why it is chosen, for the log."""
    backends: tuple[str, ...]
    """torch's (SDPBackend), in order of preference; what is not self-attention always runs on them."""
    function: str | Attention = "attention"
    """Self-attention: itself, or its name in attention.py."""
    oldest: Capability | None = (0, 0)
    """The GPUs that it runs on, `newest` included; None: it runs without a GPU."""
    newest: Capability = (99, 9)
    automatic: tuple[Capability, ...] | None = ()
    """The GPUs for which "auto" takes it where it can run; None: all."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    module: str = ""
    """What must be importable; empty: nothing but torch."""
    package: str = ""
    """The name under which users install it."""
    least: str = ""
    """Its oldest version; empty: any."""
    sparse: bool = False
    """It is `run` in dense steps only; sparse.py has the others."""
    eight_bits: bool = False
    """It rounds what it is given to 8 bits."""
    exact: Attention | None = None
    """Where a step or a block is not to be rounded to 8 bits: instead of `run`."""

    @property
    def run(self) -> Attention:
        """Self-attention."""
        from . import attention

        return getattr(attention, self.function) if isinstance(self.function, str) else self.function

    def activate(self) -> AbstractContextManager[None]:
        """Context in which `attention` prefers these backends."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel([getattr(SDPBackend, name) for name in self.backends], set_priority=True)

    def obstacle(self, capability: Capability | None, dtype: torch.dtype | str) -> str:
        """What keeps it from running; empty if nothing does."""
        if (self.oldest is None) != (capability is None):
            return "needs a GPU" if capability is None else "is for machines without a GPU"
        if self.oldest and capability and not self.oldest <= capability <= self.newest:
            wanted = f"{_dotted(self.oldest)} or newer"
            if self.newest == self.oldest:
                wanted = _dotted(self.oldest)
            return f"needs compute capability {wanted}; this GPU has {_dotted(capability)}"
        if (name := str(dtype).removeprefix("torch.")) not in self.dtypes:
            return f"computes in {', '.join(self.dtypes)}, not in {name}"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"needs the package {self.package}, which is not installed"
        if self.least and _release(version(self.package)) < _release(self.least):
            return f"needs {self.package} {self.least} or newer; installed is {version(self.package)}"
        return ""


_FALLBACKS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_CUDNN_FIRST = ("CUDNN_ATTENTION", *_FALLBACKS)
_HALF = ("bfloat16", "float16")
_HOPPER = (9, 0)
_ALL = (
    AttentionKernel(
        "fa3", "FlashAttention-3, the fastest exact one measured on Hopper", _CUDNN_FIRST, "flash_attention_3",
        oldest=_HOPPER, newest=_HOPPER, automatic=(_HOPPER,), dtypes=("bfloat16",),
        module="fa3_fwd_interface", package="fa3-fwd",
    ),
    AttentionKernel(
        "cudnn", "on Hopper 1.6 times as fast as FlashAttention-2", _CUDNN_FIRST,
        oldest=(8, 0), automatic=(_HOPPER,),
    ),
    AttentionKernel("flash", "FlashAttention-2, torch's default", _FALLBACKS, automatic=None),
    AttentionKernel(
        "flash-attn", "FlashAttention-2 of the package flash-attn", _FALLBACKS, "flash_attention_2",
        oldest=(8, 0), dtypes=_HALF, module="flash_attn", package="flash-attn",
    ),
    AttentionKernel(
        "fa3-fp8", "FlashAttention-3 in 8 bits, which changes the video", _CUDNN_FIRST,
        "flash_attention_3_fp8", oldest=_HOPPER, newest=_HOPPER, dtypes=("bfloat16",),
        module="fa3_fwd_interface", package="fa3-fwd", eight_bits=True,
    ),
    AttentionKernel(
        "sage", "SageAttention in 8 bits, which changes the video", _FALLBACKS, "sage_attention",
        oldest=(8, 0), dtypes=_HALF, module="sageattention", package="sageattention", eight_bits=True,
    ),
    AttentionKernel(
        "sol", "sparse attention in the later steps, which changes the video", _CUDNN_FIRST,
        oldest=(8, 0), dtypes=_HALF, module="comfy_kitchen", package="comfy-kitchen", least="0.2.40", sparse=True,
    ),
    AttentionKernel(
        "cpu", "no GPU", ("FLASH_ATTENTION", "MATH"), oldest=None, automatic=None
    ),
)  # fmt: skip
KERNELS: dict[str, AttentionKernel] = {kernel.name: kernel for kernel in _ALL}
"""In the order of "auto", which never takes one that changes the video. The names are those of `Parallel.attention`."""


def choose_kernel(capability: Capability | None, dtype: torch.dtype | str, wanted: str = "auto") -> AttentionKernel:
    """The kernel named `wanted`, or for "auto" the fastest exact one by what was measured.

    Asks no GPU, so any process may call it.

    Args:
        capability: of the GPU; None without one.
        dtype: of q, k and v; also as torch's name of it.
    Raises:
        ValueError: `wanted` is unknown or cannot run there.
    """
    able = [kernel for kernel in _ALL if not kernel.obstacle(capability, dtype)]
    if wanted == "auto":
        return next(k for k in able if k.automatic is None or capability in k.automatic)
    choices = ", ".join(["auto", *(kernel.name for kernel in able)])
    if wanted not in KERNELS:
        raise ValueError(f"attention is {wanted!r}; it must be one of {choices}")
    obstacle = KERNELS[wanted].obstacle(capability, dtype)
    if obstacle:
        raise ValueError(f"attention is {wanted!r}, which {obstacle}; here it may be {choices}")
    return KERNELS[wanted]


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _release(text: str) -> tuple[int, ...]:
    """ "0.2.40.post1" -> (0, 2, 40)."""
    number = re.match(r"[0-9.]*[0-9]", text)
    assert number is not None, text
    return tuple(int(part) for part in number[0].split("."))
