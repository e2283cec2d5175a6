"""Text encoders beside a transformer: that they belong together, and what they take."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
from jobs import tiny_job
from safetensors.torch import load_file
from umt5 import MODEL, train_spiece
from wan_pack.distributed.job.job import FileIdentity, Job
from wan_pack.distributed.planning.preflight import check_model
from wan_pack.distributed.planning.workload import workload_of


@pytest.fixture
def job(tiny_models: Path, tmp_path: Path) -> Job:
    encoder, tokenizer = tmp_path / "umt5.safetensors", tmp_path / "spiece.model"
    shutil.copyfile(MODEL, encoder)
    tokenizer.write_bytes(train_spiece())
    job = tiny_job(tiny_models, text="a cat")
    files = {"text_encoder": (FileIdentity.of(encoder),), "tokenizer": (FileIdentity.of(tokenizer),)}
    return dataclasses.replace(job, model=dataclasses.replace(job.model, **files))


def test_an_encoder_makes_rows_as_wide_as_the_transformer_takes(job: Job):
    """The golden encoder's are not."""
    with pytest.raises(ValueError, match=r"umt5\.safetensors makes rows of \d+ channels; the transformer takes 64"):
        check_model(job.model)


def test_an_encoder_counts_in_16_bits_where_the_job_runs_it(job: Job):
    counted = [
        workload_of(job.model, job.sampling, job.parallel, encodes_text=runs, decode=False).text_bytes
        for runs in (True, False)
    ]
    weights = sum(math.prod(tensor.shape) for tensor in load_file(MODEL).values())
    assert counted == [2 * weights, 0]
