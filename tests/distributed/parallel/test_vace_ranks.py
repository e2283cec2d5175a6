"""VACE's blocks over several ranks: split, sharded and prefetched as the main ones are."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import TINY_VACE, random_weights, write_official


@pytest.fixture(scope="module")
def vace(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("vace") / "m"
    return str(write_official(folder, random_weights(TINY_VACE, scale=0.3), TINY_VACE))


def test_every_switch_gives_the_plain_result(vace: str):
    settings = [
        {"use_ulysses": True, "use_fsdp": True},
        {"use_ulysses": True, "use_fsdp": True, "gather": "expert"},
        {"use_ulysses": False, "use_fsdp": True, "memory_optimization": True},
        {"use_ulysses": True, "use_fsdp": False, "ulysses_engine": "symmetric"},
        {"use_ulysses": True, "use_fsdp": False, "stream_blocks": True},
        {"use_ulysses": True, "use_fsdp": True, "torch_compile": True},
    ]
    for result in run_ranks("options_equal_plain", 2, folder=vace, settings=settings, backend="eager"):
        # The tokens of the controls are split as those of the noise are.
        assert result["tokens"] == [23 if options["use_ulysses"] else 45 for options in settings]
        # Four for the main blocks and three for VACE's, which leave no sum to the next; the self-attention's is one.
        assert (result["graphs"], result["breaks"]) == (6, 0)


def test_fsdp_shards_the_vace_blocks_too(vace: str):
    results = run_ranks("fsdp_keeps_only_its_rows", 3, folder=vace)
    assert sum(result["kept"] for result in results) == results[0]["whole"]
    assert max(result["kept"] for result in results) < 0.45 * results[0]["whole"]


def test_offload_takes_the_vace_blocks_along(vace: str):
    run_ranks("offload_round_trip", 2, folder=vace)
