"""How much memory a rank counts on, of a GPU and of the host that it shares."""

from __future__ import annotations

import pytest
import torch
from wan_pack.distributed.weights import free_memory
from wan_pack.distributed.weights.free_memory import free_bytes, free_host_bytes, reachable_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("available", "ranks", "each"), [(7, 1, 7), (7, 2, 3), (None, 1, 1 << 62), (None, 4, 1 << 62), (0, 2, 0)]
)
def test_ranks_share_the_hosts_memory(available: int | None, ranks: int, each: int, monkeypatch: pytest.MonkeyPatch):
    """Without a GPU it is the device's, too."""
    monkeypatch.setattr(free_memory, "available_bytes", lambda: available)
    assert free_host_bytes(ranks) == free_bytes(CPU, ranks) == reachable_bytes(CPU, ranks) == each


def test_of_a_gpu_what_torch_keeps_is_given_back_or_counted(monkeypatch: pytest.MonkeyPatch):
    """40 are free; torch has 30 of which 20 are in use."""
    emptied: list[int] = []

    def info(device: torch.device) -> tuple[int, int]:
        assert device == GPU
        return 40 + 10 * len(emptied), 80

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 if device == GPU else 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 if device == GPU else 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(free_memory, "available_bytes", lambda: 1)
    assert reachable_bytes(GPU, 2) == 50 and not emptied
    assert free_bytes(GPU, 2) == 50 and emptied
