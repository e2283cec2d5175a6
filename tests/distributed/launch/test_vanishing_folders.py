"""A job whose folder goes while its ranks are being woken."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import COMES_UP
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.evaluator import SampleConditioning
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.result import Result
from wan_pack.distributed.launch.served_job import ServedJob


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedJob]:
    """It fails, and its folder goes, at the moment in which somebody looks into that."""
    written, ends = threading.Event(), threading.Event()

    def run(write: Callable[[Path], None], given_up: Callable[[], bool]) -> Result:
        folder = JobDir.create(tmp_path)
        write(folder.inputs)
        written.set()
        assert ends.wait(COMES_UP)
        folder.remove()
        raise JobError("rank 0 was killed")

    served, scandir = ServedJob(run), os.scandir
    assert written.wait(COMES_UP)

    def gone_meanwhile(path: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            ends.set()
            served._thread.join(COMES_UP)
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", gone_meanwhile)
        yield served
    assert ends.is_set() and not list(tmp_path.iterdir())


def test_an_evaluation_tells_why_the_job_has_ended(job: ServedJob):
    with pytest.raises(JobError, match="rank 0 was killed"):
        job.evaluate(torch.zeros(1, 16, 2, 4, 6), torch.zeros(1), [SampleConditioning(text=torch.zeros(3, 8))])
    job.close()


def test_a_sampling_that_is_over_ends_as_it_ended(job: ServedJob):
    """After a cancel, it is ComfyUI's own exception that is on its way to the user."""
    job.close()
