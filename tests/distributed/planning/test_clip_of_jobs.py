"""CLIP beside a transformer: that they belong together, and what it takes of the memory."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from jobs import tiny_job
from plan_inputs import A14B, GIB, workload
from safetensors.torch import save_file
from tiny_clip import clip_weights, write_clip
from wan_pack.demo.tiny_expert import expert
from wan_pack.distributed.job.job import FileIdentity, Job, Parallel
from wan_pack.distributed.planning.gpu_memory import estimate
from wan_pack.distributed.planning.preflight import check_model
from wan_pack.distributed.planning.workload import workload_of


@pytest.fixture
def job(tiny_models: Path, tmp_path: Path) -> Job:
    """Of Wan2.1 I2V, whose image branch takes 1280 channels."""
    save_file(expert(3, 36, parts=("img_emb",)), tmp_path / "i2v.safetensors")
    job = tiny_job(tiny_models)
    files = {"high_noise": (FileIdentity.of(tmp_path / "i2v.safetensors"),), "low_noise": ()}
    return dataclasses.replace(job, model=dataclasses.replace(job.model, **files))


def with_clip(job: Job, path: Path) -> Job:
    return dataclasses.replace(job, model=dataclasses.replace(job.model, clip_vision=(FileIdentity.of(path),)))


def test_clip_makes_rows_as_wide_as_the_image_branch_takes(job: Job, tiny_models: Path, tmp_path: Path):
    check_model(with_clip(job, write_clip(tmp_path / "h.safetensors", dim=1280)).model)
    large = write_clip(tmp_path / "clip_vision_l.safetensors", dim=64)
    words = r"clip_vision_l\.safetensors makes rows of 64 channels; a Wan2\.1 I2V .* takes 1280, as clip_vision_h"
    with pytest.raises(ValueError, match=words):
        check_model(with_clip(job, large).model)
    # A model that does not look has no channels that it could fit.
    check_model(with_clip(tiny_job(tiny_models), large).model)


def test_another_file_in_its_place_is_named_as_what_it_is(job: Job):
    with pytest.raises(ValueError, match=r" is a Wan2\.1 VAE.*; expected a CLIP vision model \(clip_vision_h"):
        check_model(with_clip(job, Path(job.model.vae[0].path)).model)


def test_it_counts_in_16_bits_without_its_last_layer_where_the_job_runs_it(job: Job, tmp_path: Path):
    job = with_clip(job, write_clip(tmp_path / "clip.safetensors"))
    counted = [
        workload_of(job.model, job.sampling, job.parallel, encodes_text=False, looks=looks).clip_bytes
        for looks in (True, False)
    ]
    unused = ("layers.2.", "post_layernorm", "visual_projection")
    weights = sum(
        math.prod(tensor.shape) for name, tensor in clip_weights().items() if not any(part in name for part in unused)
    )
    assert counted == [2 * weights, 0]


def test_it_is_there_when_the_text_encoder_has_gone():
    one = Parallel(gpu_count=1)
    both = estimate(workload(text_bytes=90 * GIB, clip_bytes=100 * GIB), one)
    assert (both.text, both.weights) == (100 * GIB, 0)
    assert both == estimate(workload(clip_bytes=100 * GIB), one)
    warm = estimate(workload(clip_bytes=100 * GIB), Parallel(gpu_count=1, keep_warm_seconds=1.0))
    assert warm.weights == 2 * A14B[0]
