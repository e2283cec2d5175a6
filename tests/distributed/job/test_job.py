"""A job as it is written and read back. What it refuses is in faults/test_bad_input.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from wan_pack.distributed.job.job import (
    FileIdentity,
    ForwardsJob,
    GroupJob,
    Job,
    JobError,
    LoraFile,
    ModelFiles,
    Parallel,
    Sampling,
    Text,
)
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.job.model_files import ExpertFiles
from wan_pack.wan.model.selection import EVERYTHING

FILE = FileIdentity(path="/models/high.safetensors", size=10, mtime_ns=1)
MODEL = ModelFiles(high_noise=(FILE,), low_noise=(FILE,), vae=(FILE,), text_encoder=(FILE,))
PARALLEL = Parallel(gpu_count=2)
SAMPLING = Sampling(width=832, height=480, num_frames=81, steps=20, seed=1)
JOB = Job(id="0f", model=MODEL, parallel=PARALLEL, sampling=SAMPLING, text=Text(prompt='a "cat" ${local_rank} $(id)'))


FORWARDS = ForwardsJob(id="0e", model=(FILE,), parallel=PARALLEL, loras=(LoraFile(file=FILE, strength=-1.0),))


def test_round_trip():
    assert Job.from_json(JOB.to_json()) == JOB
    bare = dataclasses.replace(JOB, text=None)
    assert Job.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("of", "field", "value", "words"),
    [
        (FILE, "path", "relative", "absolute"),
        (FILE, "path", "/a\0b", "absolute"),
        (FILE, "path", "/\udcff", "UTF-8"),
        (JOB.text, "prompt", "a \ud800 cat", "valid Unicode"),
        (JOB.text, "prompt", "x" * 100_001, "100001 characters"),
    ],
)
def test_text_that_no_file_takes_is_refused(of: Any, field: str, value: str, words: str):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(of, **{field: value})


@pytest.mark.parametrize(
    ("layout", "stays"),
    [({}, False), ({"keep_warm_seconds": 0.5}, True), ({"more_follow": True}, True)],
)
def test_processes_stay_for_a_time_or_for_a_batch(layout: dict[str, Any], stays: bool):
    assert Parallel(gpu_count=1, **layout).stays is stays


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
    assert steps(strength=0.01) == (2000, range(1980, 2000))
    with pytest.raises(ValueError, match="one or the other"):
        steps(strength=0.5, start_step=2)


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


def test_job_folder_is_private(tmp_path: Path):
    folder = JobDir.create(tmp_path)
    folder.write_job(JOB)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.job.stat().st_mode & 0o777 == 0o600
    assert folder.read_job() == JOB
    folder.remove()


def test_every_kind_of_job_is_read_as_what_it_is():
    for job in (JOB, FORWARDS):
        assert GroupJob.from_json(job.to_json()) == job
    with pytest.raises(JobError, match=r"kind is 'forwards'; it must be one of video"):
        Job.from_json(FORWARDS.to_json())
    for kind in ("", "KIND", None, 3):
        raw = json.loads(FORWARDS.to_json()) | {"kind": kind}
        with pytest.raises(JobError, match=r"kind is .*; it must be one of video, forwards"):
            GroupJob.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": ()}, "model is"),
        ({"side": "high"}, "side is 'high'"),
        ({"loras": FORWARDS.loras * 65}, "65 LoRAs"),
        ({"parallel": Parallel(gpu_count=2, hosts=("a", "b"))}, "hosts is .* its latents stay here"),
        ({"parallel": Parallel(gpu_count=2, attention="sol")}, "attention is 'sol'.* Choose 'auto'"),
        ({"id": "x"}, "hexadecimal"),
    ],
)
def test_fault_19_evaluations_that_cannot_be_are_refused(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FORWARDS, **change)


def test_models_share_processes_with_those_of_the_same_kind_of_work():
    other = dataclasses.replace(FILE, path="/models/low.safetensors")
    assert dataclasses.replace(FORWARDS, model=(other,)).shared == FORWARDS.shared
    assert dataclasses.replace(JOB, model=dataclasses.replace(MODEL, low_noise=(other,))).shared == JOB.shared
    assert JOB.shared != FORWARDS.shared
    looking = dataclasses.replace(JOB, model=dataclasses.replace(MODEL, clip_vision=(other,)))
    assert looking.shared == JOB.shared and other in looking.files
    assert FORWARDS.files == (FILE, FILE)


def test_an_expert_is_made_of_its_own_files_and_loras():
    low = FileIdentity(path="/models/low.safetensors", size=11, mtime_ns=2)
    loras = [
        LoraFile(file=FileIdentity(path=f"/loras/{name}.safetensors", size=1, mtime_ns=1), strength=strength)
        for name, strength in (("high", 0.5), ("low", -1.0), ("low too", 1.0))
    ]
    model = dataclasses.replace(
        MODEL, low_noise=(low,), high_noise_loras=tuple(loras[:1]), low_noise_loras=tuple(loras[1:])
    )
    high_noise, low_noise = model.expert("high_noise"), model.expert("low_noise")
    assert (high_noise.files, high_noise.loras, high_noise.side) == ((FILE,), tuple(loras[:1]), "high_noise")
    assert (low_noise.files, low_noise.loras, low_noise.side) == ((low,), tuple(loras[1:]), "low_noise")
    assert high_noise.paths == [FILE.path] and low_noise.specs[0] == ("/loras/low.safetensors", -1.0, EVERYTHING)


@pytest.mark.parametrize("which", [0, 1])
def test_loras_are_there_while_none_of_them_has_changed(tmp_path: Path, which: int):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"abc")
    made_of = ExpertFiles((FILE,), tuple(LoraFile(file=FileIdentity.of(path), strength=1.0) for path in paths), None)
    assert made_of.loras_are_there
    paths[which].write_bytes(b"abcd")
    assert not made_of.loras_are_there
    paths[which].unlink()
    assert not made_of.loras_are_there


@pytest.mark.parametrize("what", ["missing", "a folder", "no text"])
def test_a_job_that_cannot_be_read_is_the_packs_own_error(tmp_path: Path, what: str):
    folder = JobDir(tmp_path)
    if what == "a folder":
        folder.job.mkdir()
    elif what == "no text":
        folder.job.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match=r"job\.json cannot be read"):
        folder.read_job()


def test_fields_that_lack_or_are_unknown_are_named_in_order():
    raw = {**json.loads(JOB.to_json()), "zebra": 1, "ape": 2}
    with pytest.raises(JobError, match=r"unknown fields \['ape', 'zebra'\]"):
        Job.from_json(json.dumps(raw))
    bare = {name: value for name, value in json.loads(JOB.to_json()).items() if name not in ("sampling", "model")}
    with pytest.raises(JobError, match=r"lacks \['model', 'sampling'\]"):
        Job.from_json(json.dumps(bare))
    deep = json.loads(JOB.to_json())
    deep["model"]["vae"][0]["size"] = "10"
    with pytest.raises(JobError, match=r"job\.json\.model\.vae\[0\]\.size is str; it must be int"):
        Job.from_json(json.dumps(deep))
    deep["model"] = "t2v"
    with pytest.raises(JobError, match=r"job\.json\.model is str; it must be an object"):
        Job.from_json(json.dumps(deep))
    deep["model"] = {**json.loads(JOB.to_json())["model"], "vae": 5}
    with pytest.raises(JobError, match=r"job\.json\.model\.vae is int; it must be a list"):
        Job.from_json(json.dumps(deep))
