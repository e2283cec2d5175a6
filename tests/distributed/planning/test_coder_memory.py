"""What a VAE has alive at once, counted on tensors without memory, beside what the plan says."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_inputs import KINDS, machine, plan, request, workload
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning.gpu_memory import (
    DECODER_PIXEL_BYTES,
    GIB,
    VAE_FRAGMENTATION,
    encoding_bytes,
    estimate,
    peer_bytes,
    picture_bytes,
    process_bytes,
    vae_decode_bytes,
    vae_width,
)
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace
from wan_pack.wan.vae import vae_layers, vae_ops
from wan_pack.wan.vae.autoencoder import _build, decode_frames, encode
from wan_pack.wan.vae.vae_keys import VaeInfo
from wan_pack.wan.vae.vae_ops import Sum, VaeOps

WIDTHS = {WAN21: (96, 96), WAN22: (160, 256)}
SIZE = (320, 192)
MOST_PARTS = 48
"""Of a decode: all of 257 frames. What is there of the frames behind, their latents, is there from the start."""


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that exist without memory: those of the host are no GPU's.

    Attributes:
        most: at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or storage.device.type != "meta":
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


def counted_vae(space: LatentSpace, parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A VAE as on a GPU, without memory."""
    monkeypatch.setattr(vae_layers, "F", OnGpu())
    monkeypatch.setitem(vae_ops.VAE_OPS, "counted", lambda: FUSED)
    return _without_memory(space, torch.bfloat16 if vae_width(parallel) == 2 else torch.float32)


@functools.cache
def _without_memory(space: LatentSpace, dtype: torch.dtype) -> Any:
    base, decoder = WIDTHS[space]
    info = VaeInfo(kind=space, base_dim=base, decoder_base_dim=decoder, upscale=1, prefix="", official=False)
    return _build(info).to(dtype)


@pytest.mark.parametrize("space", [WAN21, WAN22], ids=["Wan2.1", "Wan2.2"])
@pytest.mark.parametrize(("frames", "precision"), [(81, "bf16"), (81, "fp32"), (1001, "bf16")])
def test_the_plan_is_as_much_as_the_encoder_has_at_once(
    space: LatentSpace, frames: int, precision: str, monkeypatch: pytest.MonkeyPatch
):
    """Frames are the host's, of which it has some at a time."""
    parallel = Parallel(gpu_count=1, mixed_precision=precision)
    vae, (width, height) = counted_vae(space, parallel, monkeypatch), SIZE
    with torch.no_grad(), Alive() as counted:
        encode(vae, torch.empty(1, 3, frames, height, width), ops="counted")
    planned = encoding_bytes(space, *SIZE, frames, parallel)
    assert counted.most < planned < counted.most * 1.2, counted.most


@pytest.mark.parametrize("space", [WAN21, WAN22], ids=["Wan2.1", "Wan2.2"])
@pytest.mark.parametrize(
    ("frames", "at_once", "precision"),
    [(81, 6, "bf16"), (81, 6, "fp32"), (121, 6, "bf16"), (257, 6, "bf16"), (1001, 6, "bf16")]
    + [(93, at_once, "bf16") for at_once in (1, 2, 3, 4, 5, 6)],
)
def test_the_plan_is_as_much_as_the_decoder_has_at_once(
    space: LatentSpace, frames: int, at_once: int, precision: str, monkeypatch: pytest.MonkeyPatch
):
    """How many frames go through a coarse stage at once depends on how many there are: 81 go in smaller parts."""
    parallel = Parallel(gpu_count=1, mixed_precision=precision)
    vae, (width, height) = counted_vae(space, parallel, monkeypatch), SIZE
    with torch.no_grad(), Alive() as counted:
        latents = torch.empty(1, *space.shape(width, height, frames), device="meta")
        for _ in itertools.islice(decode_frames(vae, latents, ops="counted", at_once=at_once), MOST_PARTS):
            pass
    planned = picture_bytes(space, *SIZE, frames, 1, parallel, at_once)
    assert counted.most < planned < counted.most * 1.2, (counted.most, planned)


def test_the_vae_is_split_where_there_are_rows_for_all():
    kept, now, each = DECODER_PIXEL_BYTES[16]
    frame, vae, frames = 832 * 480 * (kept + 6 * now + 81 * each), KINDS["t2v-A14B"][2], 832 * 480 * 16 * 6
    for gpus, precision, height, expected in (
        (1, "bf16", 480, frame + vae), (1, "fp32", 480, 2 * (frame + vae)), (2, "bf16", 480, frame // 2 + vae),
        (8, "bf16", 480, frame * 8 // 60 + vae), (8, "bf16", 32, frame * 32 // 480 + vae),
        (4, "bf16", 32, frame * 8 // 480 + vae),
    ):  # fmt: skip
        parallel = Parallel(gpu_count=gpus, mixed_precision=precision)
        assert vae_decode_bytes(workload(height=height), parallel) == pytest.approx(
            # Those that are made are whole on the first.
            expected + frames * height // 480 * (2 if precision == "fp32" else 1),
            rel=1e-6,
        )


@pytest.mark.parametrize("free", [10.5, 12.0, 14.0, 16.0, 24.0])
def test_a_video_is_decoded_by_fewer_frames_where_memory_is_short(free: float):
    """Not refused for a decode of as many as there ever are, of which the estimate says what it comes to."""
    work, way = workload(width=1280, height=720, num_frames=5), request(memory_optimization=True)
    most = estimate(work, Parallel(gpu_count=1, stream_blocks=True, offload_model=True, memory_optimization=True))
    assert 18 * GIB < most.total < 19 * GIB
    chosen = plan(work, way, machine(free), "host")
    assert chosen.estimate is not None and chosen.estimate.total <= free * GIB
    assert (chosen.estimate.vae < most.vae) == (free < 19)
    assert chosen.estimate.total > min(free - 2, 18) * GIB, "as many as fit"


def test_gaps_between_a_decodes_tensors_are_counted():
    """TI2V-5B at 720p on 16 GiB: six frames at once, of 10.1 GiB alive, ran out of memory there; five have room."""
    work = workload("ti2v-5B", experts=1, width=1280, height=704, num_frames=121)
    parallel = Parallel(gpu_count=1)
    decoding = [vae_decode_bytes(work, parallel, at_once) for at_once in (6, 5)]
    needed = [process_bytes(parallel, size, gaps=VAE_FRAGMENTATION) + size for size in decoding]
    assert needed[0] > 17 * GIB and needed[1] < 16.5 * GIB
    chosen = plan(work, request(), machine(16.0), "host")
    assert chosen.estimate is not None and chosen.estimate.total < 16 * GIB
    assert not (chosen.parallel.stream_blocks or chosen.parallel.offload_model), "weights whole"


def test_what_is_decoded_at_once_goes_by_the_gpu_with_least_memory():
    """Of several that work together, as all decode the same number of frames."""
    work, asked = workload("ti2v-5B", 1, width=1280, height=704, num_frames=121), request(2, use_fsdp=True)
    small, unequal = (plan(work, asked, machine(8.0, other)).estimate for other in (8.0, 140.0))
    large = plan(work, asked, machine(140.0, 140.0)).estimate
    assert small is not None and unequal is not None and large is not None
    assert small.total == unequal.total <= 8 * 2**30
    assert large.total > small.total


@pytest.mark.parametrize("free", [None, 0])
def test_what_other_gpus_write_to_is_kept_while_a_video_is_decoded(free: int | None):
    """Whether as many frames are decoded at once as ever are, or one; beside weights that stay, or none."""
    work = workload("ti2v-5B", experts=1, width=1280, height=704, num_frames=121, steps=1)
    for stays in (0.0, 60.0):
        hidden, packed = (
            Parallel(gpu_count=2, ulysses_engine=engine, keep_warm_seconds=stays, stream_blocks=True)
            for engine in ("symmetric", "packed")
        )
        more, less = (estimate(work, way, free) for way in (hidden, packed))
        assert more.activations == less.activations == 0 < less.vae
        assert more.total - less.total == peer_bytes(work, hidden) > 0
