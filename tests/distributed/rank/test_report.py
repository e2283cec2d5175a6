"""What the report says was in effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import stub_job
from wan_pack.distributed.rank import report
from wan_pack.distributed.rank.session import Session
from wan_pack.wan.model.attention_kernels import KERNELS


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
