"""Animate's further parts over several ranks, wherever their weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import TINY_ANIMATE, random_weights, write_official


@pytest.fixture(scope="module")
def animate(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("animate") / "m"
    return str(write_official(folder, random_weights(TINY_ANIMATE, scale=0.3), TINY_ANIMATE))


def test_every_switch_gives_the_plain_result(animate: str):
    """Three ranks: none has whole frames."""
    settings = [
        {"use_ulysses": True, "use_fsdp": True},
        {"use_ulysses": True, "use_fsdp": True, "gather": "expert"},
        {"use_ulysses": False, "use_fsdp": True, "memory_optimization": True},
        {"use_ulysses": True, "use_fsdp": False, "stream_blocks": True},
    ]
    run_ranks("options_equal_plain", 3, folder=animate, settings=settings)


def test_fsdp_shards_all_of_it(animate: str):
    results = run_ranks("fsdp_keeps_only_its_rows", 3, folder=animate)
    assert sum(result["kept"] for result in results) == results[0]["whole"]
    assert max(result["kept"] for result in results) < 0.45 * results[0]["whole"]
