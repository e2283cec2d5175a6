"""Scaled dot-product attention and the choice of its kernel.

A new kernel is one entry in `KERNELS`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .codes import CodesAttention, Heads, quantise_heads

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [S, H, D]; k, v [K, H, D] -> [S, H, D], dtype of q. Strided views are read as they are."""
Capability = tuple[int, int]
"""A GPU's compute capability, (9, 0) for Hopper."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over unbatched heads by torch: the backend that `AttentionKernel.activate` prefers.

    Args:
        q: [S, H, D]; k, v: [K, H, D]. Strided views are read as they are.
    Returns:
        [S, H, D], dtype of q.
    """
    if q.shape[1] == 0:
        # With more ranks than heads a rank may hold none.
        return q
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608) by the package fa3-fwd: bf16, Hopper."""
    from fa3_fwd_interface import flash_attn_func

    if q.shape[1] == 0:
        return q
    out = flash_attn_func(q[None], k[None], v[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def flash_attention_3_fp8(q: Heads, k: Heads, v: Heads) -> Tensor:
    """FlashAttention-3 on e4m3 codes with one scale per head and tensor (section 3.3 there):

        softmax(sq sk q8 k8^T / sqrt(D)) sv v8

    The kernel multiplies by the scales inside. Lossy: a relative error of about 5e-2 per call on Gaussian input, and
    6e-2 on input with loud channels if q and k come as `codes.spread_codes`, 2e-1 otherwise. Returns bf16.
    """
    from fa3_fwd_interface import flash_attn_func

    codes, scales = zip(*(quantise_heads(x) if isinstance(x, Tensor) else x for x in (q, k, v)), strict=True)
    if codes[0].shape[1] == 0:
        return codes[0].to(torch.bfloat16)
    names = ("q_descale", "k_descale", "v_descale")
    descale = {name: scale[None] for name, scale in zip(names, scales, strict=True)}
    out = flash_attn_func(*(x[None] for x in codes), **descale)
    return (out[0] if isinstance(out, tuple) else out)[0].to(torch.bfloat16)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 (Dao, 2023, arXiv 2307.08691) by the package flash-attn."""
    from flash_attn import flash_attn_func

    return q if q.shape[1] == 0 else flash_attn_func(q[None], k[None], v[None])[0]


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention 1 (Zhang et al., 2024, arXiv 2410.02367): q k^T on int8 codes, k with its mean taken off.

    Lossy: a relative error of about 1e-2 per call on Gaussian input.
    """
    from sageattention import sageattn

    return q if q.shape[1] == 0 else sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """How attention between tokens is computed, and where it can be."""

    name: str
    reason: str
    """Why it is chosen, for the log."""
    backends: tuple[SDPBackend, ...]
    """torch's, in order of preference; what is not self-attention always runs on them."""
    run: Attention = attention
    """Self-attention."""
    oldest: Capability | None = (0, 0)
    """The GPUs that it runs on, `newest` included; None: it runs without a GPU."""
    newest: Capability = (99, 9)
    automatic: tuple[Capability, ...] | None = ()
    """The GPUs for which "auto" takes it where it can run; None: all."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    module: str = ""
    """What must be importable; empty: nothing but torch."""
    package: str = ""
    """The name under which users install it."""
    least: str = ""
    """Its oldest version; empty: any."""
    sparse: bool = False
    """It is `run` in dense steps only; sparse.py has the others."""

    def activate(self) -> AbstractContextManager[None]:
        """Context in which `attention` prefers these backends."""
        return sdpa_kernel(list(self.backends), set_priority=True)

    def obstacle(self, capability: Capability | None, dtype: torch.dtype) -> str:
        """What keeps it from running; empty if nothing does."""
        if (self.oldest is None) != (capability is None):
            return "needs a GPU" if capability is None else "is for machines without a GPU"
        if self.oldest is not None and not self.oldest <= capability <= self.newest:
            wanted = f"{_dotted(self.oldest)} or newer"
            if self.newest == self.oldest:
                wanted = _dotted(self.oldest)
            return f"needs compute capability {wanted}; this GPU has {_dotted(capability)}"
        if dtype not in self.dtypes:
            return f"computes in {', '.join(map(_name, self.dtypes))}, not in {_name(dtype)}"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"needs the package {self.package}, which is not installed"
        if self.least and _release(version(self.package)) < _release(self.least):
            return f"needs {self.package} {self.least} or newer; installed is {version(self.package)}"
        return ""


_FALLBACKS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, *_FALLBACKS)
_HALF = (torch.bfloat16, torch.float16)
_HOPPER = (9, 0)
_ALL = (
    AttentionKernel(
        "fa3", "FlashAttention-3, the fastest exact one measured on Hopper", _CUDNN_FIRST, flash_attention_3,
        oldest=_HOPPER, newest=_HOPPER, automatic=(_HOPPER,), dtypes=(torch.bfloat16,),
        module="fa3_fwd_interface", package="fa3-fwd",
    ),
    AttentionKernel(
        "cudnn", "on Hopper 1.6 times as fast as FlashAttention-2", _CUDNN_FIRST,
        oldest=(8, 0), automatic=(_HOPPER,),
    ),
    AttentionKernel("flash", "FlashAttention-2, torch's default", _FALLBACKS, automatic=None),
    AttentionKernel(
        "flash-attn", "FlashAttention-2 of the package flash-attn", _FALLBACKS, flash_attention_2,
        oldest=(8, 0), dtypes=_HALF, module="flash_attn", package="flash-attn",
    ),
    AttentionKernel(
        "fa3-fp8", "FlashAttention-3 in 8 bits, which changes the video", _CUDNN_FIRST,
        CodesAttention(flash_attention_3_fp8), oldest=_HOPPER, newest=_HOPPER, dtypes=(torch.bfloat16,),
        module="fa3_fwd_interface", package="fa3-fwd",
    ),
    AttentionKernel(
        "sage", "SageAttention in 8 bits, which changes the video", _FALLBACKS, sage_attention,
        oldest=(8, 0), dtypes=_HALF, module="sageattention", package="sageattention",
    ),
    AttentionKernel(
        "sol", "sparse attention in the later steps, which changes the video", _CUDNN_FIRST,
        oldest=(8, 0), dtypes=_HALF, module="comfy_kitchen", package="comfy-kitchen", least="0.2.40", sparse=True,
    ),
    AttentionKernel(
        "cpu", "no GPU", (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH), oldest=None, automatic=None
    ),
)  # fmt: skip
KERNELS: dict[str, AttentionKernel] = {kernel.name: kernel for kernel in _ALL}
"""In the order of "auto", which never takes one that changes the video. The names are those of `Parallel.attention`."""


def choose_kernel(capability: Capability | None, dtype: torch.dtype, wanted: str = "auto") -> AttentionKernel:
    """The kernel named `wanted`, or for "auto" the fastest exact one by what was measured.

    Asks no GPU, so any process may call it.

    Args:
        capability: of the GPU; None without one.
        dtype: of q, k and v.
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
    return tuple(int(part) for part in re.match(r"[0-9.]*[0-9]", text)[0].split("."))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
