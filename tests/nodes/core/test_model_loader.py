"""The node: which file, config and LoRAs its model is computed with, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from core_sampling import Modules, ksampler
from node_inputs import use_model_folders
from plain_evaluator import PlainEvaluator
from safetensors.torch import save_file
from wan_pack.demo.tiny_expert import lora
from wan_pack.distributed.job.job import ForwardsJob
from wan_pack.nodes.core import sampling_jobs
from wan_pack.nodes.core.model_loader import LoadDiffusionModelDistributed
from wan_pack.nodes.core.patch_files import PatchFiles
from wan_pack.nodes.host import host, warm
from wan_pack.nodes.models.loras import WanVideoDistributedLora
from wan_pack.nodes.settings.spread import DistributedConfig

FILE = "t2v-high-noise.safetensors"


class Recorded:
    """In the place of the pool's evaluators: computes here, and keeps the jobs."""

    def __init__(self) -> None:
        self.jobs: list[ForwardsJob] = []

    def open(self, job: ForwardsJob) -> PlainEvaluator:
        self.jobs.append(job)
        return PlainEvaluator(Path(job.model[0].path), job.loras)


@pytest.fixture
def source(core: Modules, expert_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    use_model_folders(tmp_path, monkeypatch)
    for folder in ("diffusion_models", "loras"):
        (tmp_path / folder).mkdir()
    os.link(expert_files["T2V"], tmp_path / "diffusion_models" / FILE)
    save_file({name: tensor.bfloat16() for name, tensor in lora(1).items()}, tmp_path / "loras" / "lora.safetensors")
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    recorded, files = Recorded(), PatchFiles(lambda: tmp_path)
    monkeypatch.setattr(warm, "evaluators", lambda: recorded)
    monkeypatch.setattr(sampling_jobs, "patch_files", lambda: files)
    return recorded


def load(**inputs: Any) -> Any:
    return LoadDiffusionModelDistributed().load(unet_name=FILE, **inputs)[0]


def test_its_model_is_sampled_by_core(core: Modules, source: Recorded, expert_files: dict[str, Path]) -> None:
    theirs = core["comfy.sd"].load_diffusion_model(str(expert_files["T2V"]))
    config = DistributedConfig(gpu_count=2, cfg_parallel="off", mixed_precision="fp32", keep_warm_seconds=5)
    difference = ksampler(core["nodes"], load(config=config)) - ksampler(core["nodes"], theirs)
    assert difference.abs().max() < 1e-4
    (job,) = source.jobs
    assert (Path(job.model[0].path).name, job.side, job.loras) == (FILE, "high_noise", ())
    assert (job.parallel.gpu_count, job.parallel.mixed_precision, job.parallel.keep_warm_seconds) == (2, "fp32", 5)


def test_without_a_config_the_processes_stay_for_the_next_sampler(core: Modules, source: Recorded) -> None:
    ksampler(core["nodes"], load())
    assert source.jobs[0].parallel.keep_warm_seconds == 60


def test_loras_by_name_are_those_of_core(core: Modules, source: Recorded, tmp_path: Path) -> None:
    (chosen,) = WanVideoDistributedLora().add("lora.safetensors", 0.6)
    own = ksampler(core["nodes"], load(lora=chosen))
    tensors = core["comfy.utils"].load_torch_file(str(tmp_path / "loras" / "lora.safetensors"))
    added = core["comfy.sd"].load_lora_for_models(load(), None, tensors, 0.6, 0)[0]
    theirs = ksampler(core["nodes"], added)
    # bf16 factors, merged from the file and from what ComfyUI read of it.
    assert (own - theirs).abs().max() < 1e-4 and (own - ksampler(core["nodes"], load())).abs().max() > 0.01
    assert [lora.strength for job in source.jobs for lora in job.loras] == [0.6, 0.6]


def test_what_is_no_config_or_no_transformer_is_refused(source: Recorded, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config is list; connect Wan Video Distributed Config"):
        load(config=[])
    with pytest.raises(ValueError, match=r"lora\.safetensors: it is a LoRA"):
        os.link(tmp_path / "loras" / "lora.safetensors", tmp_path / "diffusion_models" / "lora.safetensors")
        LoadDiffusionModelDistributed().load(unet_name="lora.safetensors")


def test_a_replaced_file_is_loaded_anew(source: Recorded, tmp_path: Path) -> None:
    before = LoadDiffusionModelDistributed.IS_CHANGED(unet_name=FILE)
    assert LoadDiffusionModelDistributed.IS_CHANGED(unet_name=FILE) == before
    os.utime(tmp_path / "diffusion_models" / FILE, ns=(1, 1))
    assert LoadDiffusionModelDistributed.IS_CHANGED(unet_name=FILE) != before
    assert LoadDiffusionModelDistributed.IS_CHANGED() == ""
