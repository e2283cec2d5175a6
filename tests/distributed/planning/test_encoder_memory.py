"""What a VAE's encoder has alive at once, counted on tensors without memory, beside what the plan says."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning.gpu_memory import encoding_bytes, vae_width
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace
from wan_pack.wan.vae import vae_layers, vae_ops
from wan_pack.wan.vae.autoencoder import _build, encode
from wan_pack.wan.vae.vae_keys import VaeInfo
from wan_pack.wan.vae.vae_ops import Sum, VaeOps

WIDTHS = {WAN21: (96, 96), WAN22: (160, 256)}
SIZE = (320, 192)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that exist.

    Attributes:
        most: at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)

        def gone() -> None:
            self._known.discard(key)
            self._now -= size

        weakref.finalize(storage, gone)


class OnGpu:
    """What `torch.nn.functional` makes on a GPU: convolutions give channels last, and attention keeps no scores."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def conv2d(self, x: Tensor, weight: Tensor, bias: None, stride: Any, padding: Any) -> Tensor:
        sides = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
        made = [(side + 2 * around - kernel) // step + 1 for side, kernel, step, around in sides]
        return x.new_empty(x.shape[0], *made, weight.shape[0]).movedim(-1, 1)

    conv3d = conv2d

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)


def _add(total: Sum, out: Tensor | None) -> Tensor:
    if out is not None:
        return out
    return total.x if total.bias is None and total.residual is None else torch.empty_like(total.x)


FUSED = VaeOps(_add, lambda total, *_: total.x, lambda *_: None)
"""What the kernels allocate."""


def alive(space: LatentSpace, frames: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes at once, without the VAE's."""
    monkeypatch.setattr(vae_layers, "F", OnGpu())
    monkeypatch.setitem(vae_ops.VAE_OPS, "counted", lambda: FUSED)
    base, decoder = WIDTHS[space]
    info = VaeInfo(kind=space, base_dim=base, decoder_base_dim=decoder, upscale=1, prefix="", official=False)
    vae = _build(info).to(dtype)
    width, height = SIZE
    with torch.no_grad(), Alive() as counted:
        encode(vae, torch.empty(1, 3, frames, height, width, dtype=dtype, device="meta"), ops="counted")
    return counted.most


@pytest.mark.parametrize("space", [WAN21, WAN22], ids=["Wan2.1", "Wan2.2"])
@pytest.mark.parametrize(("frames", "precision"), [(81, "bf16"), (81, "fp32"), (1001, "bf16")])
def test_the_plan_is_as_much_as_the_encoder_has_at_once(
    space: LatentSpace, frames: int, precision: str, monkeypatch: pytest.MonkeyPatch
):
    parallel = Parallel(gpu_count=1, mixed_precision=precision)
    counted = alive(space, frames, torch.bfloat16 if vae_width(parallel) == 2 else torch.float32, monkeypatch)
    assert counted * 0.99 < encoding_bytes(space, *SIZE, frames, parallel) < counted * 1.2, counted
