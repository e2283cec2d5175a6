"""Jobs that cannot work are refused before any process starts; what a rank reads is checked once more."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import FILE, run_stub, stub_job, tiny_job
from wan_pack.distributed.job.job import VERSION, Job, JobError, LoraFile, ModelFiles, Parallel, Sampling, Text
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.launch.launcher import JobFailed, Result
from wan_pack.distributed.machine import gpus
from wan_pack.distributed.planning.preflight import check_job

MODEL = ModelFiles(high_noise=(FILE,), low_noise=(FILE,), vae=(FILE,), text_encoder=(FILE,))
PARALLEL = Parallel(gpu_count=2)
SAMPLING = Sampling(width=832, height=480, num_frames=81, steps=20, seed=1)
JOB = Job(id="0f", model=MODEL, parallel=PARALLEL, sampling=SAMPLING, text=Text(prompt='a "cat" ${local_rank} $(id)'))


@pytest.mark.parametrize(
    ("of", "field", "value", "words"),
    [
        (PARALLEL, "gpu_count", 0, "1 to 64"),
        (PARALLEL, "gpu_count", 65, "1 to 64"),
        (PARALLEL, "gpu_ids", ("0",), "one per GPU"),
        (PARALLEL, "gpu_ids", ("0", "0"), "without repeats"),
        (PARALLEL, "use_ulysses", False, "use_ulysses and use_fsdp both off"),
        (PARALLEL, "mixed_precision", "fp64", "bf16, fp16, fp32"),
        (PARALLEL, "ulysses_engine", "ring", "auto, packed, symmetric, deepspeed"),
        (PARALLEL, "master_port", 80, "1024 to 65535"),
        (PARALLEL, "master_port", 70000, "1024 to 65535"),
        (PARALLEL, "start_timeout", float("nan"), "seconds"),
        (PARALLEL, "stall_timeout", 0.0, "seconds"),
        (PARALLEL, "keep_warm_seconds", -1.0, "0 to 86400"),
        (SAMPLING, "width", 0, "16 to 8192"),
        (SAMPLING, "num_frames", 80, "77 and 81|81 and 85"),
        (SAMPLING, "num_frames", -3, r"4n \+ 1"),
        (SAMPLING, "steps", 0, "1 to 1000"),
        (SAMPLING, "seed", -1, "0 to 2"),
        (SAMPLING, "seed", 2**64, "0 to 2"),
        (SAMPLING, "solver", "ddim", "unipc"),
        (SAMPLING, "shift", 0.0, "over 0"),
        (SAMPLING, "guidance_low", float("nan"), "0 to 100"),
        (SAMPLING, "guidance_high", float("inf"), "0 to 100"),
        (SAMPLING, "boundary", 1.5, "0 to 1"),
        (SAMPLING, "fps", 0.0, "1 to 240"),
        (SAMPLING, "strength", 0.0, "0.01 to 1"),
        (SAMPLING, "strength", float("nan"), "0.01 to 1"),
        (SAMPLING, "start_step", 20, "0 to 19"),
        (SAMPLING, "end_step", 21, "1 to 20"),
        (SAMPLING, "end_step", -1, "1 to 20"),
        (MODEL, "vae", (), "at least one file"),
        (LoraFile(file=FILE, strength=1.0), "strength", float("inf"), "-100 to 100"),
        (LoraFile(file=FILE, strength=1.0), "strength", 100.5, "-100 to 100"),
        (LoraFile(file=FILE, strength=1.0), "strength", -100.5, "-100 to 100"),
        (JOB, "id", "../x", "hexadecimal"),
        (JOB, "id", "", "hexadecimal"),
        (JOB, "id", "a" * 65, "hexadecimal"),
        (JOB, "id", "0F", "hexadecimal"),
        (PARALLEL, "stall_timeout", 86401.0, "1 to 86400 seconds"),
        (PARALLEL, "start_timeout", 0.5, "1 to 86400 seconds"),
        (PARALLEL, "gpu_ids", ("0", "; x"), "indices of nvidia-smi or UUIDs"),
        (PARALLEL, "sparse_tau", 0.0, "0.1 to 3"),
        (PARALLEL, "sparse_tau", 3.1, "0.1 to 3"),
        (PARALLEL, "exact_steps", 101, "0 to 100"),
        (PARALLEL, "exact_blocks", "1-", "empty, or numbers and ranges of them, such as 0-2, 39, all below 1000"),
        (dataclasses.replace(PARALLEL, gpu_count=3), "cfg_parallel", True, "off with an odd number"),
        (JOB, "version", 1, "version is 1"),
    ],
)
def test_fault_19_bad_values_name_field_value_and_what_is_allowed(of: Any, field: str, value: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        dataclasses.replace(of, **{field: value})
    assert field in str(caught.value)


def test_fault_19_random_values_only_raise_value_error():
    values = [0, 1, -1, 2**70, 1.5, float("nan"), float("-inf"), "", "bf16", "packed", True, False, 16, 81, (), ("a",)]
    for seed in range(5000):
        rng = random.Random(seed)
        of = rng.choice([PARALLEL, SAMPLING])
        field = rng.choice(dataclasses.fields(of))
        of_its_type = [v for v in values if type(v) is type(getattr(of, field.name))]
        try:
            dataclasses.replace(of, **{field.name: rng.choice(of_its_type)})
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("settings", "shapes", "words"),
    [
        (
            {"ulysses_engine": "deepspeed", "gpu_count": 3},
            {},
            "3 GPUs share a sequence, which does not divide the model's 2",
        ),
        ({"width": 250}, {}, "width is 250; it must be a multiple of 16. The nearest are 240 and 256"),
        ({}, {"context": (0, 64)}, r"text_embeds has shape \(0, 64\); it must be \[1 to 512, 64\]"),
        ({}, {"context": (513, 64)}, r"text_embeds has shape \(513, 64\)"),
        ({}, {"context_null": (0, 64)}, r"negative_embeds has shape \(0, 64\)"),
        ({}, {"context": (3, 4096)}, r"text_embeds has shape \(3, 4096\)"),
        ({}, {"samples": (16, 9, 9, 9)}, r"samples has shape \[16, 9, 9, 9\]; .* call for \[16, 2, 6, 8\]"),
    ],
)
def test_fault_19_a_job_that_does_not_fit_its_model_is_refused(
    tiny_models: Path, settings: dict[str, Any], shapes: dict[str, Any], words: str
):
    good = {"context": (3, 64), "context_null": (3, 64)}
    check_job(tiny_job(tiny_models), good)
    with pytest.raises(ValueError, match=words):
        check_job(tiny_job(tiny_models, **settings), {**good, **shapes})


@pytest.mark.parametrize(
    ("settings", "notes", "words"),
    [
        ({"gpu_count": 1, "use_fsdp": True}, ["use_fsdp has no effect on one GPU"], []),
        ({"gpu_count": 1, "master_port": 5000}, ["master_port has no effect on one GPU"], []),
        ({"gpu_count": 1}, [], []),
        ({"gpu_count": 2}, [], []),
        ({"gpu_count": 3}, [], ["2 heads do not divide by 3 GPUs: some compute 1, some 0"]),
        ({"gpu_count": 3, "use_ulysses": False, "use_fsdp": True}, [], []),
        ({"gpu_count": 4, "cfg_parallel": True}, [], []),
    ],
)
def test_what_has_no_effect_or_costs_time_is_said(
    tiny_models: Path, settings: dict[str, Any], notes: list[str], words: list[str]
):
    told: list[str] = []
    shapes = {"context": (1, 64), "context_null": (512, 64)}
    warnings = check_job(tiny_job(tiny_models, **settings), shapes, told.append)
    assert told == notes
    assert [found[: len(word)] for found, word in zip(warnings, words, strict=True)] == words


def test_a_second_prompt_is_asked_for_where_there_is_a_second_pass(tiny_models: Path):
    for low, high, needed in ((1.0, 1.0, False), (3.0, 1.0, True), (1.0, 3.0, True)):
        job = tiny_job(tiny_models, guidance_low=low, guidance_high=high)
        if needed:
            with pytest.raises(ValueError, match=rf"guidance is {low} \(low\) and {high} \(high\)"):
                check_job(job, {"context": (1, 64)})
        else:
            check_job(job, {"context": (1, 64)})
    with pytest.raises(ValueError, match="cfg_parallel is on"):
        check_job(tiny_job(tiny_models, cfg_parallel=True, guidance_low=1.0, guidance_high=1.0), {"context": (1, 64)})


def test_fault_19_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch):
    gpu = gpus.Gpu(index="0", uuid="GPU-0", name="H200", total_bytes=1 << 37, free_bytes=1 << 37)
    monkeypatch.setattr(gpus, "list_gpus", lambda: [gpu])
    with pytest.raises(ValueError, match=r"gpu_count is 2; it must be 1 to 1\. The GPUs are: 0 H200"):
        gpus.choose_gpus(2)


def test_fault_20_mutated_json_only_raises_job_error():
    good = JOB.to_json()
    junk = ['"', "{", "}", "[", "null", "1e999", "-", "\\u0000", "\x00", "NaN", '"x":1,', "true", "é", " " * 100]
    for seed in range(2000):
        rng = random.Random(seed)
        text = good
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(junk) + text[at + rng.randint(0, 4) :]
        try:
            Job.from_json(text)
        except JobError as error:
            assert "job.json" in str(error), f"seed {seed}"


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"id": "0f"}'])
def test_fault_20_damaged_json_is_a_job_error(text: str):
    with pytest.raises(JobError, match=r"job\.json"):
        Job.from_json(text)


def test_fault_20_types_are_not_coerced():
    for path, value in ((("sampling", "steps"), "20"), (("parallel", "use_fsdp"), 1), (("sampling", "steps"), True)):
        raw = json.loads(JOB.to_json())
        raw[path[0]][path[1]] = value
        with pytest.raises(JobError, match=path[1]):
            Job.from_json(json.dumps(raw))


def test_fault_20_reads_are_bounded(tmp_path: Path):
    folder = JobDir.create(tmp_path)
    folder.job.write_bytes(b" " * (5 << 20))
    with pytest.raises(JobError, match="over 4194304 bytes"):
        folder.read_job()
    folder.result.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match=r"result\.json cannot be read"):
        folder.read_json(folder.result)
    folder.remove()


@pytest.mark.processes
def test_fault_20_a_rank_names_what_is_wrong_with_its_job(stub_pack: Callable[..., None], tmp_path: Path):
    def damage(inputs: Path) -> None:
        job = inputs.with_name("job.json")
        job.write_text(job.read_text().replace(f'"version": {VERSION}', '"version": 99'))

    stub_pack("good")
    with pytest.raises(JobFailed, match=r"^rank [01]: JobError: job\.json is not a job this version can run: version"):
        run_stub(tmp_path, stub_job(), damage)


def test_fault_30_other_systems_are_refused_in_plain_words(
    run_fake: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(JobError, match="this system is win32; videos are made on Linux"):
        run_fake("good")
    assert not (tmp_path / "jobs").exists()


def test_fault_30_a_torch_that_sees_no_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    import torch
    from wan_pack.distributed.rank.session import Session

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(JobError, match=r"GPUs 4, 1 were chosen, but torch .* sees 0; the driver may be too old"):
        Session.of(stub_job(gpu_ids=("4", "1")))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(JobError, match="sees 1; CUDA shows a process one MIG slice only"):
        Session.of(stub_job(gpu_ids=("MIG-1", "MIG-2")))
    with pytest.raises(JobError, match="WORLD_SIZE is 2; the job was written for 1"):
        Session.of(stub_job(gpu_count=1))
