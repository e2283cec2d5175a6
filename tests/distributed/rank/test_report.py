"""What the report says was in effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import stub_job
from wan_pack.distributed.job.job import ForwardsJob
from wan_pack.distributed.rank import report
from wan_pack.distributed.rank.session import Session
from wan_pack.wan.model.attention_kernels import KERNELS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exact_steps": 1}, "the first and last 1 step (2 of 4)"),
        ({"exact_steps": 2, "exact_blocks": "39, 1,0"}, "the first and last 2 steps (4 of 4); blocks 0-1, 39"),
        ({"exact_blocks": "3"}, "block 3"),
        ({}, None),
        ({"exact_steps": 1, "linear_precision": "full"}, None),
    ],
)
def test_what_was_not_in_8_bits(settings: dict[str, Any], words: str | None):
    session = Session(rank=0, world=1, device=torch.device("cpu"), kernel=KERNELS["cpu"], ops="plain", vae_ops="plain")
    job = stub_job(gpu_count=1, **{"linear_precision": "fp8", **settings})
    assert len(job.sampling.step_range) == 4
    assert report.settings_of(job, session).get("not in 8 bits") == words
    # Of a sampler elsewhere it is not known how many steps it has.
    forwards = ForwardsJob(id="ab", parallel=job.parallel, model=job.model.transformer)
    told = words and words.replace(" (2 of 4)", "").replace(" (4 of 4)", "")
    assert report.settings_of(forwards, session).get("not in 8 bits") == told


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "off"),
        ({"keep_warm_seconds": 90.0}, "90 s"),
        ({"more_follow": True}, "until the batch is done"),
        ({"more_follow": True, "keep_warm_seconds": 90.0}, "until the batch is done"),
    ],
)
def test_how_long_the_processes_stay(layout: dict[str, Any], words: str):
    session = Session(rank=0, world=1, device=torch.device("cpu"), kernel=KERNELS["cpu"], ops="plain", vae_ops="plain")
    assert report.settings_of(stub_job(gpu_count=1, **layout), session)["keep warm"] == words
