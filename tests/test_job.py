"""A job is checked when it is made and when it is read back."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from wan_pack.distributed.job import FileIdentity, Job, JobError, LoraFile, ModelFiles, Parallel, Sampling, Text
from wan_pack.distributed.jobdir import JobDir

FILE = FileIdentity(path="/models/high.safetensors", size=10, mtime_ns=1)
MODEL = ModelFiles(high_noise=(FILE,), low_noise=(FILE,), vae=(FILE,), text_encoder=(FILE,))
PARALLEL = Parallel(gpu_count=2)
SAMPLING = Sampling(width=832, height=480, num_frames=81, steps=20, seed=1)
JOB = Job(id="0f", model=MODEL, parallel=PARALLEL, sampling=SAMPLING, text=Text(prompt='a "cat" ${local_rank} $(id)'))


def test_round_trip():
    assert Job.from_json(JOB.to_json()) == JOB
    bare = dataclasses.replace(JOB, text=None)
    assert Job.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("of", "field", "value", "words"),
    [
        (PARALLEL, "gpu_count", 0, "1 to 64"),
        (PARALLEL, "gpu_count", 65, "1 to 64"),
        (PARALLEL, "gpu_ids", ("0",), "one per GPU"),
        (PARALLEL, "gpu_ids", ("0", "0"), "without repeats"),
        (PARALLEL, "use_ulysses", False, "use_ulysses and use_fsdp both off"),
        (PARALLEL, "keep_warm_seconds", -1.0, "0 to 86400"),
        (PARALLEL, "keep_warm_seconds", float("nan"), "0 to 86400"),
        (dataclasses.replace(PARALLEL, gpu_count=3), "cfg_parallel", True, "odd number of GPUs"),
        (PARALLEL, "mixed_precision", "fp64", "bf16, fp16, fp32"),
        (PARALLEL, "ulysses_engine", "ring", "packed, deepspeed"),
        (PARALLEL, "master_port", 80, "1024 to 65535"),
        (PARALLEL, "master_port", 70000, "1024 to 65535"),
        (PARALLEL, "start_timeout", float("nan"), "seconds"),
        (PARALLEL, "stall_timeout", 0.0, "seconds"),
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
        (FILE, "path", "relative", "absolute"),
        (FILE, "path", "/a\0b", "absolute"),
        (FILE, "path", "/\udcff", "UTF-8"),
        (JOB.text, "prompt", "a \ud800 cat", "valid Unicode"),
        (JOB, "id", "../x", "hexadecimal"),
        (JOB, "version", 1, "version is 1"),
    ],
)
def test_bad_values_name_field_value_and_what_is_allowed(of: Any, field: str, value: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        dataclasses.replace(of, **{field: value})
    assert field in str(caught.value)


def test_a_prompt_needs_a_text_encoder():
    with pytest.raises(ValueError, match="text_encoder"):
        dataclasses.replace(JOB, model=dataclasses.replace(MODEL, text_encoder=()))


def test_a_model_has_one_expert_or_two():
    for name in ("high_noise", "low_noise"):
        one = dataclasses.replace(MODEL, **{name: ()})
        assert one.transformer == (FILE,)
        assert Job.from_json(dataclasses.replace(JOB, model=one).to_json()).model == one
        with pytest.raises(ValueError, match=f"{name}_loras is given"):
            dataclasses.replace(one, **{f"{name}_loras": (LoraFile(file=FILE, strength=1.0),)})
    with pytest.raises(ValueError, match="both empty"):
        dataclasses.replace(MODEL, high_noise=(), low_noise=())


def test_the_part_of_the_schedule_that_runs():
    def steps(**settings: Any) -> tuple[int, range]:
        sampling = dataclasses.replace(SAMPLING, **settings)
        return sampling.schedule_steps, sampling.step_range

    assert steps() == (20, range(20))
    assert steps(start_step=5, end_step=12) == (20, range(5, 12))
    assert steps(start_step=19) == (20, range(19, 20))
    # Half of the noise: the last 20 steps of 40.
    assert steps(strength=0.5) == (40, range(20, 40))
    with pytest.raises(ValueError, match="one or the other"):
        steps(strength=0.5, start_step=2)


def test_random_values_only_raise_value_error():
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


def test_mutated_json_only_raises_job_error():
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
def test_damaged_json_is_a_job_error(text: str):
    with pytest.raises(JobError, match=r"job\.json"):
        Job.from_json(text)


def test_types_are_not_coerced():
    for path, value in ((("sampling", "steps"), "20"), (("parallel", "use_fsdp"), 1), (("sampling", "steps"), True)):
        raw = json.loads(JOB.to_json())
        raw[path[0]][path[1]] = value
        with pytest.raises(JobError, match=path[1]):
            Job.from_json(json.dumps(raw))


def test_a_changed_file_is_named(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"1234")
    identity = FileIdentity.of(path)
    identity.check_unchanged()
    path.write_bytes(b"12345")
    with pytest.raises(JobError, match=r"w\.safetensors changed since the job was written: 4 bytes then, 5 bytes now"):
        identity.check_unchanged()
    path.unlink()
    with pytest.raises(JobError, match=r"w\.safetensors cannot be read"):
        identity.check_unchanged()


def test_job_folder_is_private_and_reads_are_bounded(tmp_path: Path):
    folder = JobDir.create(tmp_path)
    folder.write_job(JOB)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.job.stat().st_mode & 0o777 == 0o600
    assert folder.read_job() == JOB
    folder.job.write_bytes(b" " * (5 << 20))
    with pytest.raises(JobError, match="over 4194304 bytes"):
        folder.read_job()
    folder.result.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match=r"result\.json cannot be read"):
        folder.read_json(folder.result)


def test_readers_never_see_half_a_file(tmp_path: Path):
    import threading

    folder = JobDir.create(tmp_path)
    folder.write_json(folder.progress, {"step": 0, "text": "x" * 5000})
    done = threading.Event()

    def write() -> None:
        for step in range(1000):
            folder.write_json(folder.progress, {"step": step, "text": "x" * 5000})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert len(folder.read_json(folder.progress)["text"]) == 5000
        reads += 1
    writer.join()
    assert reads > 10
    assert [path.name for path in folder.path.iterdir() if path.is_file()] == ["progress.json"]
