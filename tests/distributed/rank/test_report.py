"""What the report says was in effect."""

from __future__ import annotations

import dataclasses
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from wan_pack.distributed.job.job import VERSION, FileIdentity, ForwardsJob, LoraFile, VaeJob
from wan_pack.distributed.rank import report
from wan_pack.distributed.rank.session import Session
from wan_pack.wan.model.attention_kernels import KERNELS
from wan_pack.wan.model.selection import Selection

SESSION = Session(rank=0, world=1, device=torch.device("cpu"), kernel=KERNELS["cpu"], ops="plain", vae_ops="plain")


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
    job = stub_job(gpu_count=1, **{"linear_precision": "fp8", **settings})
    assert len(job.sampling.step_range) == 4
    assert report.settings_of(job, SESSION).get("not in 8 bits") == words
    # Of a sampler elsewhere it is not known how many steps it has.
    forwards = ForwardsJob(id="ab", parallel=job.parallel, model=job.model.transformer)
    told = words and words.replace(" (2 of 4)", "").replace(" (4 of 4)", "")
    assert report.settings_of(forwards, SESSION).get("not in 8 bits") == told
    # A VAE rounds nothing to 8 bits, whatever the config says.
    shapes = {"given": (1, 16, 1, 2, 2), "made": (1, 3, 1, 16, 16)}
    decode = VaeJob(id="ab", parallel=job.parallel, vae=job.model.vae, encode=False, **shapes)
    assert "not in 8 bits" not in report.settings_of(decode, SESSION)


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
    assert report.settings_of(stub_job(gpu_count=1, **layout), SESSION)["keep warm"] == words


def test_all_that_was_in_effect_is_told_of_a_plain_job():
    job = stub_job(gpu_count=1, mixed_precision="bf16", solver="dpm++", shift=5.0, steps=4)
    assert report.settings_of(job, SESSION) == {
        "device": "1 x CPU",
        "sequence parallel": "off",
        "cfg parallel": False,
        "fsdp": False,
        "offload": False,
        "streamed blocks": False,
        "memory optimization": job.parallel.memory_optimization,
        "compiled": False,
        "precision": "bf16, VAE float32",
        "kernels": "plain",
        "attention": f"cpu ({KERNELS['cpu'].reason})",
        "LoRAs": "none",
        "solver": "dpm++, 4 steps, shift 5",
        "guidance": "4 high, 3 low",
        "keep warm": "off",
        "torch": torch.__version__,
    }


def lora(name: str, strength: float, **selection: Any) -> LoraFile:
    file = FileIdentity(path=f"/loras/{name}.safetensors", size=1, mtime_ns=1)
    return LoraFile(file=file, strength=strength, selection=Selection(**selection))


@pytest.mark.parametrize(
    ("high", "low", "words"),
    [
        ((), (), "none"),
        (("lightning",), (), "high lightning 0.5"),
        ((), ("style",), "low style 0.5"),
        (("lightning", "style"), ("lightning",), "high lightning 0.5, style 0.5; low lightning 0.5"),
    ],
)
def test_loras_are_told_by_expert_name_and_strength(high: tuple[str, ...], low: tuple[str, ...], words: str):
    job = stub_job(gpu_count=1)
    loras = {"high_noise_loras": high, "low_noise_loras": low}
    given = {name: tuple(lora(one, 0.5) for one in some) for name, some in loras.items()}
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, **given))
    assert report.settings_of(job, SESSION)["LoRAs"] == words


def test_of_a_model_without_experts_loras_and_what_is_used_of_them_are_told():
    given = (lora("style", -1.0, blocks=(0, 1), without=("ffn",)), lora("fox", 0.75))
    job = stub_job(gpu_count=1)
    forwards = ForwardsJob(id="ab", parallel=job.parallel, model=job.model.transformer, loras=given)
    told = report.settings_of(forwards, SESSION)
    assert told["LoRAs"] == "style -1 (blocks 0, 1; without ffn), fox 0.75"
    assert not {"solver", "guidance"} & told.keys() and "VAE" not in str(told["precision"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 8, "start_step": 2, "end_step": 5}, "unipc, 8 steps (2 to 5 of 8), shift 12"),
        ({"steps": 6, "strength": 0.6}, "unipc, 6 steps (4 to 10 of 10), shift 12"),
        ({"steps": 6, "solver": "euler", "shift": 2.5}, "euler, 6 steps, shift 2.5"),
    ],
)
def test_of_a_part_of_the_schedule_it_is_told_which(settings: dict[str, Any], words: str):
    assert report.settings_of(stub_job(gpu_count=1, **settings), SESSION)["solver"] == words


@pytest.mark.parametrize(
    ("settings", "name", "told"),
    [
        ({}, "sequence parallel", "Ulysses over 2 GPUs, packed"),
        ({"ulysses_engine": "deepspeed"}, "sequence parallel", "Ulysses over 2 GPUs, deepspeed"),
        ({"use_ulysses": False, "use_fsdp": True}, "sequence parallel", "off"),
        ({"cfg_parallel": True}, "sequence parallel", "off"),
        ({"cfg_parallel": True}, "cfg parallel", True),
        ({"use_fsdp": True}, "fsdp", "gathers one block"),
        ({"use_fsdp": True, "gather": "expert"}, "fsdp", "gathers one expert"),
        ({"linear_precision": "fp8"}, "precision", "bf16, large matrix products fp8, VAE float32"),
        ({"linear_precision": "int8"}, "precision", "bf16, large weights int8, unpacked for each use, VAE float32"),
    ],
)
def test_how_ranks_share_and_round_is_told(settings: dict[str, Any], name: str, told: Any):
    session = dataclasses.replace(SESSION, world=2)
    session.mesh = SimpleNamespace(ulysses_group=None)  # type: ignore[assignment]
    job = stub_job(gpu_count=2, **settings)
    assert report.settings_of(job, session)[name] == told
    if name == "fsdp":
        assert report.settings_of(job, dataclasses.replace(session, world=1))["fsdp"] is False


def test_a_symmetric_exchange_is_told_with_its_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "way_of", lambda group: f"symmetric by {group}")
    session = dataclasses.replace(SESSION, world=2)
    session.mesh = SimpleNamespace(ulysses_group="copies")  # type: ignore[assignment]
    told = report.settings_of(stub_job(gpu_count=2, ulysses_engine="symmetric"), session)
    assert told["sequence parallel"] == "Ulysses over 2 GPUs, symmetric by copies"


def test_of_attention_that_is_sparse_it_is_told_how_and_in_how_many_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Session, "sparse", SimpleNamespace(tau=2.5, steps=range(1, 3)))
    told = report.settings_of(stub_job(gpu_count=1), SESSION)["attention"]
    assert told == f"cpu ({KERNELS['cpu'].reason}), tau 2.5, in 2 of 4 steps"
    forwards = ForwardsJob(id="ab", parallel=stub_job().parallel, model=stub_job().model.transformer)
    assert "tau" not in str(report.settings_of(forwards, SESSION)["attention"])


@pytest.mark.parametrize(("reused", "threshold", "words"), [
    ([1, 3], 0.05, "2 of 4 (reuse_threshold 0.05)"), ([], 0.5, "0 of 4 (reuse_threshold 0.5)"), ([], 0.0, None),
])  # fmt: skip
def test_what_a_result_holds(reused: list[int], threshold: float, words: str | None):
    job = dataclasses.replace(stub_job(gpu_count=1, reuse_threshold=threshold), warnings=("as planned",))
    result = report.result_of(
        job, SESSION, phases={"load": 1.5}, step_seconds=[2.0], peaks=[[1, 2], [3, 4]], notes=["as it ran"],
        spans=[("process", 1.0, 2.0)], reused=reused, evaluations=7,
    )  # fmt: skip
    assert result["settings"].pop("reused steps", None) == words
    assert result["settings"] == report.settings_of(job, SESSION)
    assert {name: value for name, value in result.items() if name != "settings"} == {
        "id": job.id,
        "version": VERSION,
        "evaluations": 7,
        "phases": {"load": 1.5},
        "spans": [("process", 1.0, 2.0)],
        "step_seconds": [2.0],
        "reused_steps": reused,
        "peak_gpu_bytes": [1, 3],
        "peak_rss_bytes": [2, 4],
        "warnings": ["as planned", "as it ran"],
    }
    forwards = ForwardsJob(id="ab", parallel=job.parallel, model=job.model.transformer)
    assert "reused_steps" not in report.result_of(forwards, SESSION, phases={}, step_seconds=[], peaks=[])


@pytest.mark.parametrize("scale", [1, 2])
def test_a_video_is_told_as_the_vae_makes_it(monkeypatch: pytest.MonkeyPatch, scale: int):
    monkeypatch.setattr(Session, "vae", lambda session, job: SimpleNamespace(upscale=scale))
    job = stub_job(gpu_count=1, width=64, height=48, fps=24.0)
    told = report.video_of(job, SESSION, frames=5, latents_shape=[1, 16, 2, 6, 8])
    assert told["latents"] == {"shape": [1, 16, 2, 6, 8], "dtype": "float32"}
    size = {"width": 64 * scale, "height": 48 * scale}
    assert told["video"] == {**size, "frames": 5, "fps": 24.0, "format": job.sampling.video_format}
    assert report.video_of(job, SESSION, frames=0, latents_shape=[1])["video"] is None


def test_what_one_rank_used_at_most_is_in_bytes():
    # In the system's KiB; it only grows.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ((gpu, host),) = report.gather_peaks(SESSION)
    assert gpu == 0
    assert before * 1024 <= host <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_every_ranks_peaks_are_told_in_their_order(monkeypatch: pytest.MonkeyPatch):
    session = dataclasses.replace(SESSION, world=2)
    session.mesh = SimpleNamespace(group="all")  # type: ignore[assignment]

    def gather(everyone: torch.Tensor, mine: torch.Tensor, *, group: str) -> None:
        assert group == "all"
        everyone.copy_(torch.cat((mine, torch.tensor([7, 8]))))

    monkeypatch.setattr(report.dist, "all_gather_into_tensor", gather)
    (gpu, host), other = report.gather_peaks(session)
    assert gpu == 0 and host > 1 << 20 and other == [7, 8]
