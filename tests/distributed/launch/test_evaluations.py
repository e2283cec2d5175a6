"""Evaluations for a sampler elsewhere: what a group computes is what the model in this process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluating import SHAPE, Known, difference, inputs
from fresh_jobs import run_fresh
from wan_pack.distributed.job.job import ForwardsJob
from wan_pack.distributed.launch.group_evaluator import GroupEvaluator
from wan_pack.distributed.launch.result import Result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Known]:
    folder = tmp_path_factory.mktemp("models")
    return {name: Known.make(folder / name, name) for name in ("T2V", "I2V", "TI2V-5B")}


def on_forked_ranks(job: ForwardsJob, folder: Path) -> GroupEvaluator:
    """On real ranks, without the seconds of their start."""
    return GroupEvaluator(lambda write, cancelled: Result(run_fresh(job, folder, write), {}, "", 0.0))


LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"gpu_count": 1},
    "2": {"gpu_count": 2},
    "2 sharded": {"gpu_count": 2, "use_fsdp": True},
    "2 by prompt": {"gpu_count": 2, "cfg_parallel": True},
    "3": {"gpu_count": 3, "memory_optimization": True},
    "4 by prompt": {"gpu_count": 4, "cfg_parallel": True},
    "4 by prompt, sharded": {"gpu_count": 4, "cfg_parallel": True, "use_fsdp": True, "gather": "expert"},
    "1 streamed": {"gpu_count": 1, "stream_blocks": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["T2V", "I2V", "TI2V-5B"])
def test_a_group_gives_what_the_model_gives(variant: str, layout: str, models: dict[str, Known], tmp_path: Path):
    """Batches of one, two and three, other sizes meanwhile, timesteps by frame where the model has them."""
    model = models[variant]
    evaluator = on_forked_ranks(model.job(**LAYOUTS[layout], keep_warm_seconds=0), tmp_path)
    cases = [(1, SHAPE), (2, SHAPE), (3, SHAPE), (2, (1, 4, 6)), (2, SHAPE)]
    try:
        for seed, (batch, shape) in enumerate(cases):
            given = inputs(model.config, seed, batch=batch, shape=shape, by_frame=variant == "TI2V-5B" and seed > 0)
            assert difference(evaluator.evaluate(*given), model.evaluate(*given)) < 1e-5
    finally:
        evaluator.close()
