"""What a group is asked for one sampling of ComfyUI's: which files, LoRAs and layout, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_pack.demo.example import TinyModel
from wan_pack.demo.tiny_expert import lora
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import FileIdentity, ForwardsJob, LoraFile
from wan_pack.distributed.job.progress import Progress
from wan_pack.distributed.job.sampling import EVERYWHERE, RoundedTimesteps
from wan_pack.distributed.launch.pool import Pool
from wan_pack.distributed.machine import gpu_locks, nvidia_smi
from wan_pack.distributed.planning.gpu_memory import Workload
from wan_pack.distributed.planning.workload import workload_of_forwards
from wan_pack.nodes.core import sampling_jobs
from wan_pack.nodes.core.patch_files import PatchFiles
from wan_pack.nodes.core.sampling_jobs import SamplingJobs
from wan_pack.nodes.host import host, warm
from wan_pack.nodes.host.core_model import KEY, AddedPatches, CoreSampling
from wan_pack.nodes.inference import ground
from wan_pack.nodes.settings.spread import DistributedConfig
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.model.variants import VARIANTS

LATENTS = (1, 16, 2, 6, 8)
NAMES = TinyModel()


def entry(tokens: int) -> dict[str, Any]:
    return {"cross_attn": torch.zeros(1, tokens, 64)}


def sampling(shape: tuple[int, ...] = LATENTS, *added: AddedPatches, **changes: Any) -> CoreSampling:
    """With guidance, unless `changes` say otherwise."""
    fields = {
        "patcher": SimpleNamespace(attachments={KEY: added}),
        "conds": {"positive": [entry(9)], "negative": [entry(9)]},
        "options": {},
        "shape": shape,
        "sigmas": torch.linspace(1, 0, 5),
        "guidance": 5.0,
        **changes,
    }
    return CoreSampling(**fields)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What nvidia-smi prints: `gpus` cards of 24 GiB."""
    fake = SimpleNamespace(gpus=2)

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        lines = [f"{i}, GPU-{i}, NVIDIA, 24564, 23000" for i in range(fake.gpus)]
        return subprocess.CompletedProcess(command, 0, ("" if "topo" in command else "\n".join(lines)).encode(), b"")

    monkeypatch.setattr(nvidia_smi, "ask_program", run)
    return fake


@pytest.fixture
def job_of(
    tiny_models: Path, tmp_path: Path, printed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ForwardsJob]:
    """(a sampling, the config's settings) -> the job that the first evaluation would start."""
    pool, files = Pool(), PatchFiles(lambda: tmp_path)
    for name, value in (("free_memory", None), ("visible_gpus", None), ("verbose", False)):
        monkeypatch.setattr(host, name, lambda value=value: value)
    monkeypatch.setattr(gpu_locks, "_folder", lambda: tmp_path)
    monkeypatch.setattr(warm, "pool", lambda: pool)
    monkeypatch.setattr(sampling_jobs, "patch_files", lambda: files)
    monkeypatch.setattr(ground, "_fixed_links", ground._fixed_links.__wrapped__)

    def make(
        asked: CoreSampling, *, name: str = NAMES.high_noise, loras: Any = (), variant: str = "T2V", **config: Any
    ) -> ForwardsJob:
        file = FileIdentity.of(tiny_models / "diffusion_models" / name)
        opened: list[ForwardsJob] = []
        source = SimpleNamespace(open=opened.append)
        row = VARIANTS[variant]
        model = replace(Checkpoint([file.path]).config, in_dim=row.channels[0], parts=row.parts)
        start = SamplingJobs((file,), loras, DistributedConfig(**config), model, source).prepare(asked)
        assert opened == [], "not before the first evaluation"
        start()
        return opened[0]

    return make


def test_what_is_known_to_be_wrong_is_said_before_anything_starts(
    job_of: Callable[..., ForwardsJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="a conditioning has no text"):
        job_of(sampling(conds={"positive": [entry(9)], "negative": [{"cross_attn": None}]}))
    seen = {"clip_vision_output": object()}
    with pytest.raises(ValueError, match=r"connect CLIP Vision Encode.*clip_vision_output"):
        job_of(sampling(conds={"positive": [entry(9) | seen], "negative": [entry(9)]}), variant="Wan2.1 I2V")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(JobError, match="this system is darwin; videos are made on Linux"):
        job_of(sampling())


@pytest.mark.parametrize("plan", ["auto", "as set"])
def test_what_comfyui_holds_leaves_the_gpus_planned_or_not(
    job_of: Callable[..., ForwardsJob], monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    freed: list[int] = []
    monkeypatch.setattr(host, "free_memory", lambda: freed.append(1))
    job_of(sampling(), plan=plan)
    assert freed == [1]


def test_what_comfyui_keeps_on_a_gpu_is_said(
    job_of: Callable[..., ForwardsJob], printed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models that packs load past ComfyUI; a little of a GPU is always kept."""
    said: list[str] = []
    monkeypatch.setattr(host, "log", said.append)
    kept = comfyui_keeps(monkeypatch, {"0": 3 << 30, "1": 1 << 20})
    job_of(sampling())
    (plan,) = [line for line in said if line.startswith("plan: ")]
    assert "ComfyUI keeps 3.0 GiB of GPU 0 although it was asked" in plan and "GPU 1 although" not in plan
    with pytest.raises(ValueError, match=r"ComfyUI keeps 3\.0 GiB of GPU 0 .* or leave that GPU out with gpu_ids"):
        job_of(sampling((1, 16, 1025, 600, 600)), gpu_count=1)
    kept.clear()
    said.clear()
    job_of(sampling())
    assert "ComfyUI keeps" not in "".join(said)


def comfyui_keeps(monkeypatch: pytest.MonkeyPatch, kept: dict[str, int]) -> dict[str, int]:
    """uuid -> bytes, as this process' torch tells."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=str(1 - number)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: kept.get(str(1 - number), 0))
    return kept


def test_what_a_sampler_waits_for_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(host, "log", said.append)
    waits = warm.Waits()
    for phase, message in (("start", "GPU 0 is taken"), ("start", "GPU 0 is taken"), ("load", "x"), ("start", "")):
        waits(Progress(phase=phase, message=message))
    assert said == ["GPU 0 is taken"]


def test_a_guided_sampling_is_planned_with_cfg_parallel(job_of: Callable[..., ForwardsJob]) -> None:
    job = job_of(sampling())
    assert (job.parallel.gpu_ids, job.parallel.cfg_parallel, job.parallel.use_fsdp) == (("0", "1"), True, False)
    assert (Path(job.model[0].path).name, job.side, job.loras) == (NAMES.high_noise, "high_noise", ())
    assert job_of(sampling(), name=NAMES.low_noise).side == "low_noise"


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": 1.0},
        {"conds": {"positive": [entry(9)]}},
        {"conds": {"positive": [entry(9)], "negative": [entry(8)]}},
    ],
    ids=["CFG 1", "one prompt", "prompts of other lengths"],
)
def test_without_two_prompts_in_one_call_there_is_no_cfg_parallel(
    job_of: Callable[..., ForwardsJob], changes: dict[str, Any]
) -> None:
    assert not job_of(sampling(**changes)).parallel.cfg_parallel
    assert not job_of(sampling(**changes), plan="as set").parallel.cfg_parallel
    assert job_of(sampling(**changes), cfg_parallel="on").parallel.cfg_parallel


def test_guidance_of_one_that_is_evaluated_nevertheless(job_of: Callable[..., ForwardsJob]) -> None:
    always = {"disable_cfg1_optimization": True}
    assert job_of(sampling(guidance=1.0, options=always)).parallel.cfg_parallel


def test_the_switches_count_where_nothing_is_planned(
    job_of: Callable[..., ForwardsJob], printed: SimpleNamespace
) -> None:
    printed.gpus = 0
    job = job_of(sampling(), gpu_count=3, mixed_precision="fp32", keep_warm_seconds=5)
    assert (job.parallel.gpu_count, job.parallel.gpu_ids, job.parallel.mixed_precision) == (3, (), "fp32")
    assert (job.parallel.cfg_parallel, job.parallel.keep_warm_seconds) == (False, 5.0)
    assert any("2 heads do not divide by 3 GPUs" in line for line in job.warnings)


def test_a_context_window_is_what_must_fit(job_of: Callable[..., ForwardsJob]) -> None:
    """4000 latent frames of 1280x720 fit nowhere; seven at a time do."""
    endless = (1, 16, 4000, 90, 160)
    with pytest.raises(ValueError, match="1280x720 with 15997 frames does not fit"):
        job_of(sampling(endless))
    job_of(sampling(endless, options={"context_handler": SimpleNamespace(context_length=7, dim=2)}))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What plans are made for."""
    made: list[dict[str, Any]] = []

    def workload(files: Any, shape: tuple[int, ...], parallel: Any, **more: Any) -> Workload:
        made.append({"shape": shape, **more})
        return workload_of_forwards(files, shape, parallel, **more)

    monkeypatch.setattr("wan_pack.distributed.planning.workload.workload_of_forwards", workload)
    return made


@pytest.mark.parametrize(("variant", "frames", "counted"), [("VACE", 2, 2), ("VACE", 0, 1), ("T2V", 2, 0)])
def test_the_controls_of_a_chain_are_planned(
    job_of: Callable[..., ForwardsJob], planned: list[dict[str, Any]], variant: str, frames: int, counted: int
) -> None:
    """Of the longer one; a VACE model that is given none follows ComfyUI's empty one."""
    followed = {"vace_frames": [torch.zeros(1, 32, 2, 6, 8)] * frames} if frames else {}
    job_of(sampling(conds={"positive": [entry(9), entry(9) | followed], "negative": [entry(9)]}), variant=variant)
    assert [one["controls"] for one in planned] == [counted]


@pytest.mark.parametrize(("variant", "frames"), [("Fun-Control", 3), ("T2V", 2)])
def test_a_picture_in_front_is_planned_where_there_is_a_place_for_it(
    job_of: Callable[..., ForwardsJob], planned: list[dict[str, Any]], variant: str, frames: int
) -> None:
    pictured = entry(9) | {"reference_latents": [torch.zeros(1, 16, 1, 6, 8)]}
    job_of(sampling(conds={"positive": [pictured], "negative": [pictured]}), variant=variant)
    assert [one["shape"] for one in planned] == [(1, 16, frames, 6, 8)]


@pytest.mark.parametrize(("sigmas", "steps"), [(torch.linspace(1, 0, 5), 4), (torch.zeros(1), 1), (torch.zeros(0), 1)])
def test_steps_guidance_and_expert_are_planned(
    job_of: Callable[..., ForwardsJob], planned: list[dict[str, Any]], sigmas: torch.Tensor, steps: int
) -> None:
    job_of(sampling(sigmas=sigmas))
    job_of(sampling(sigmas=sigmas, guidance=1.0), name=NAMES.low_noise)
    told = [{name: one[name] for name in ("steps", "guided", "expert", "loras")} for one in planned]
    of = {"steps": steps, "loras": ()}
    assert told == [{**of, "guided": True, "expert": "high_noise"}, {**of, "guided": False, "expert": "low_noise"}]


def test_loras_of_both_doors_come_in_order(job_of: Callable[..., ForwardsJob], tiny_models: Path) -> None:
    own = LoraFile(file=FileIdentity.of(tiny_models / "diffusion_models" / NAMES.low_noise), strength=0.5)
    key = "diffusion_model.blocks.0.ffn.0"
    up, down = (lora(1)[f"{key}.lora_{part}.weight"] for part in ("up", "down"))
    patch = SimpleNamespace(name="lora", weights=(up, down, None, None, None, None))
    added = AddedPatches({f"{key}.weight": patch}, 0.7, 1.0)
    with pytest.raises(ValueError, match="expected a LoRA"):
        job_of(sampling(LATENTS, added), loras=(own,))
    (written,) = job_of(sampling(LATENTS, added)).loras
    assert written.strength == 0.7 and Path(written.file.path).name.startswith("lora-")


def test_latents_of_another_model_are_refused(job_of: Callable[..., ForwardsJob]) -> None:
    with pytest.raises(ValueError, match=r"\[1, 48, 2, 6, 8\]; a T2V model's are videos of 16 channels"):
        job_of(sampling((1, 48, 2, 6, 8)))
    with pytest.raises(ValueError, match=r"\[1, 16, 6, 8\]"):
        job_of(sampling((1, 16, 6, 8)))


def test_several_machines_are_refused(job_of: Callable[..., ForwardsJob]) -> None:
    with pytest.raises(ValueError, match="hostfile is two; a sampler of ComfyUI's needs the GPUs of this machine"):
        job_of(sampling(), hostfile="two")


def test_exact_steps_are_those_of_the_samplers_noise_levels(job_of: Callable[..., ForwardsJob]) -> None:
    """Of the second of two samplers only the last ones."""
    assert job_of(sampling(), exact_steps=1).rounded == RoundedTimesteps(above=375.0, below=875.0)
    second = sampling(sigmas=torch.linspace(0.5, 0, 3))
    assert job_of(second, exact_steps=1).rounded == RoundedTimesteps(above=375.0)
    assert job_of(sampling()).rounded == EVERYWHERE


def test_files_of_patches_are_no_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last few stay, where a job leaves nothing."""
    monkeypatch.setattr(host, "jobs_folder", lambda: tmp_path / "wan_distributed")
    folder = sampling_jobs.patch_files.__wrapped__()._folder()
    assert folder.parent == tmp_path and folder != host.jobs_folder()


def test_of_a_lora_file_for_both_experts_the_half_of_this_one_is_planned_and_taken(
    job_of: Callable[..., ForwardsJob], tmp_path: Path
) -> None:
    halves = {f"{side}.{name.removeprefix('diffusion_model.')}": tensor.clone()
              for side in ("transformer", "transformer_2") for name, tensor in lora(1).items()}  # fmt: skip
    save_file(halves, tmp_path / "both.safetensors")
    own = LoraFile(file=FileIdentity.of(tmp_path / "both.safetensors"), strength=1.0)
    for name, side in ((NAMES.high_noise, "high_noise"), (NAMES.low_noise, "low_noise")):
        job = job_of(sampling(), name=name, loras=(own,))
        assert (job.loras, job.side) == ((own,), side)
