"""Switches that are taken as they are: who computes the two prompts of a step."""

from __future__ import annotations

from itertools import product

import pytest
from wan_pack.distributed.machine import gpus
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.nodes.host import host
from wan_pack.nodes.inference.ground import as_switched
from wan_pack.nodes.settings.spread import DistributedConfig

CARDS = [Gpu(index=str(i), uuid=f"GPU-{i}", name="", total_bytes=24 << 30, free_bytes=23 << 30) for i in range(4)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_halves_of_an_even_number_take_a_prompt_each_where_work_is_shared(
    count: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", lambda: CARDS)
    monkeypatch.setattr(host, "visible_gpus", lambda: None)
    for ulysses, fsdp, guided in product((True, False), repeat=3):
        chosen = DistributedConfig(
            gpu_count=count, use_ulysses=ulysses, use_fsdp=fsdp, offload_model=False, cfg_parallel=asked
        )
        shared = guided and count in (2, 4) and (ulysses or fsdp)
        expected = shared if asked == "auto" else asked == "on"
        if expected and count in (1, 3):
            words = "cfg_parallel is True; it must be off with an odd number of GPUs"
        elif not (ulysses or fsdp) and count > (2 if expected else 1):
            words = "with use_ulysses and use_fsdp both off: every GPU would compute the same video"
        else:
            words = ""
        if words:
            with pytest.raises(ValueError, match=words):
                as_switched(chosen, chosen.parallel(), guided=guided)
            continue
        found = as_switched(chosen, chosen.parallel(), guided=guided)
        assert found.cfg_parallel is expected, (ulysses, fsdp, guided)
        assert (found.gpu_count, found.gpu_ids) == (count, ("0", "1", "2", "3")[:count])
        assert (found.use_ulysses, found.use_fsdp) == (ulysses, fsdp)
