"""A picture decoded for ComfyUI's nodes by ranks without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import FILE, agent_of, gone_within, rank_of
from left_over import held
from patience import AT_ONCE
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import Parallel, VaeJob
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import JobFailed, new_job_id
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.launch.vae_calls import VaeCalls
from wan_pack.distributed.machine.processes import Process

GIVEN = torch.zeros(1, 16, 1, 2, 2)
Act = Callable[["Decoding"], Any]


def decoding(**parallel: Any) -> VaeJob:
    layout = {"gpu_count": 2, "start_timeout": 60.0, "stall_timeout": 60.0, "keep_warm_seconds": 600.0, **parallel}
    shapes: dict[str, Any] = {"given": tuple(GIVEN.shape), "made": (1, 3, 1, 16, 16)}
    return VaeJob(id=new_job_id(), vae=(FILE,), encode=False, parallel=Parallel(**layout), **shapes)


class Decoding:
    """On ranks without torch. `act` is called once, when they are at work and rank 1 has come to part `at`."""

    def __init__(self, folder: Path, pool: Pool, act: Act | None = None, at: int = 1) -> None:
        self.folder, self.pool, self.act, self.at = folder, pool, act, at
        self.cancelled, self.acted = False, False
        self.processes: list[Process] = []
        self.before = held()
        self.calls = VaeCalls(
            pool, lambda: None, parent=folder / "jobs", failed=folder / "failed", cancelled=self.look,
        )  # fmt: skip

    def look(self) -> bool:
        """Asked again and again; whether the node is cancelled."""
        if self.act is None or self.acted:
            return self.cancelled
        try:
            signs = [self.job.read_json(self.job.alive(rank)) for rank in (0, 1)]
            at_work = all(sign["phase"] == "decode" for sign in signs) and signs[1]["step"] >= self.at - 1
        except (JobError, ValueError):
            # They start, or have ended.
            at_work = False
        if at_work:
            self.acted = True
            self.processes = [agent_of(self.job), rank_of(self.job, 0), rank_of(self.job, 1)]
            self.act(self)
        return self.cancelled

    @property
    def job(self) -> JobDir:
        (path,) = (self.folder / "jobs").glob("wan-job-*")
        return JobDir(path)

    def run(self, **parallel: Any) -> None:
        """Which must be right."""
        with self.calls.together():
            made = self.calls.run(decoding(**parallel), GIVEN)
        assert made.view(torch.uint8).unique().tolist() == [7]
        del made

    def fails(self, **parallel: Any) -> JobFailed:
        with pytest.raises(JobFailed) as caught:
            self.run(**parallel)
        return caught.value

    def nothing_is_left(self) -> None:
        assert gone_within(AT_ONCE, *self.processes)
        assert held() == self.before
        assert not list((self.folder / "jobs").glob("*"))
        assert self.pool.view() == []
