"""How many frames a rank decodes at once, by the memory that is free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning.gpu_memory import VAE_FRAGMENTATION, picture_bytes
from wan_pack.distributed.rank import work
from wan_pack.wan.model.latent_space import WAN22

LATENTS = (48, 6, 30, 52)
WHOLE = (WAN22, 832, 480, 21, 1)


class Vae:
    upscale = 1

    def decode(self, latents: Tensor, *, clamp: bool, at_once: int) -> tuple[tuple[int, ...], bool, int]:
        return tuple(latents.shape), clamp, at_once


def needed(at_once: int, gpus: int = 1, kernels: float = 1.0) -> int:
    return int(picture_bytes(*WHOLE, Parallel(gpu_count=gpus), at_once) * (1 + VAE_FRAGMENTATION) * kernels)


def asked(gpus: int = 1, *, clamp: bool = True, ops: str = "triton") -> Any:
    session: Any = SimpleNamespace(
        vae=lambda job: Vae(), device=torch.device("cpu"), group=None if gpus == 1 else object(), vae_ops=ops
    )
    return work.decoded(session, SimpleNamespace(parallel=Parallel(gpu_count=gpus)), torch.empty(LATENTS), clamp=clamp)


@pytest.mark.parametrize(
    ("free", "at_once"),
    [(needed(6), 6), (needed(6) - 1, 5), (needed(4), 4), (needed(2), 2), (needed(2) - 1, 1), (0, 1), (1 << 50, 6)],
)
@pytest.mark.parametrize("clamp", [False, True])
def test_as_many_as_there_is_memory_for(free: int, at_once: int, clamp: bool, monkeypatch: pytest.MonkeyPatch):
    """And the way to try with too little memory for one is to try."""
    monkeypatch.setattr(work, "reachable_bytes", lambda device, ranks: free)
    assert asked(clamp=clamp) == ((1, *LATENTS), clamp, at_once)


def test_kernels_that_are_not_fused_need_more(monkeypatch: pytest.MonkeyPatch):
    """As those of most GPUs are not."""
    assert needed(3, kernels=1.3) <= needed(6) < needed(4, kernels=1.3)
    for free, at_once in ((needed(6), 3), (needed(6, kernels=1.3), 6), (needed(6, kernels=1.3) - 1, 5)):
        monkeypatch.setattr(work, "reachable_bytes", lambda device, ranks, free=free: free)
        assert asked(ops="plain")[2] == at_once


def test_what_one_rank_has_no_memory_for_none_decodes(monkeypatch: pytest.MonkeyPatch):
    """All hold parts of the same frames: another number on one of them would wait for the others for ever."""
    monkeypatch.setattr(work, "reachable_bytes", lambda device, ranks: needed(6, gpus=2))
    said: list[bool] = []

    def everywhere(mine: bool, group: object, device: object) -> bool:
        said.append(mine)
        return mine and len(said) == 3

    monkeypatch.setattr(work, "everywhere", everywhere)
    assert asked(2)[2] == 4
    assert said == [True, True, True]
