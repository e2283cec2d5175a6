"""The text encoder of a rank, from job to job."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import tiny_job
from umt5 import MODEL, train_spiece
from wan_pack.distributed.job.job import FileIdentity, Job, JobError, Text
from wan_pack.distributed.rank import prompts as module
from wan_pack.distributed.rank.prompts import PromptEncoder
from wan_pack.distributed.weights.offload import HostParking
from wan_pack.wan.text import text_encoder


@pytest.fixture
def job(tiny_models: Path, tmp_path: Path) -> Job:
    encoder, tokenizer = tmp_path / "umt5.safetensors", tmp_path / "spiece.model"
    shutil.copyfile(MODEL, encoder)
    tokenizer.write_bytes(train_spiece())
    job = tiny_job(tiny_models, text="a cat walks on the grass", keep_warm_seconds=60.0)
    files = {"text_encoder": (FileIdentity.of(encoder),), "tokenizer": (FileIdentity.of(tokenizer),)}
    return dataclasses.replace(job, model=dataclasses.replace(job.model, **files))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The files of each load of an encoder."""
    seen: list[list[str]] = []
    load = text_encoder.load_text_encoder

    def counted(files: list[str], *args, **kwargs):
        seen.append(files)
        return load(files, *args, **kwargs)

    monkeypatch.setattr(text_encoder, "load_text_encoder", counted)
    return seen


def changed(job: Job, **values) -> Job:
    return dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, **values))


@pytest.mark.parametrize("stays", [{}, {"keep_warm_seconds": 0.0, "more_follow": True}], ids=["warm", "in a batch"])
def test_a_rank_that_stays_reads_its_text_encoder_once(stays: dict[str, Any], job: Job, loads: list[list[str]]):
    job = changed(job, **stays)
    prompts, other = PromptEncoder(torch.device("cpu")), dataclasses.replace(job, text=Text(prompt="a white cat"))
    rows = [
        prompts.encode(job, negative=True),
        prompts.encode(other, negative=False),
        prompts.encode(job, negative=True),
    ]
    assert len(loads) == 1
    assert len(rows[0]) == 2 and len(rows[1]) == 1
    assert not torch.equal(rows[0][0][:3], rows[1][0][:3])
    for once, again in zip(rows[0], rows[2], strict=True):
        assert torch.equal(once, again)


def test_an_encoder_that_is_replaced_while_it_is_read_encodes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch):
    load, file = text_encoder.load_text_encoder, Path(job.model.text_encoder[0].path)

    def replaced_meanwhile(*given: Any, **how: Any) -> Any:
        encoder = load(*given, **how)
        shutil.copyfile(MODEL, file.with_name("new"))
        file.with_name("new").replace(file)
        return encoder

    monkeypatch.setattr(text_encoder, "load_text_encoder", replaced_meanwhile)
    with pytest.raises(JobError, match=r"umt5\.safetensors changed since the job was written"):
        PromptEncoder(torch.device("cpu")).encode(job, negative=False)


def test_another_encoder_takes_the_place(job: Job, loads: list[list[str]], tmp_path: Path):
    other = tmp_path / "other.safetensors"
    shutil.copyfile(MODEL, other)
    model = dataclasses.replace(job.model, text_encoder=(FileIdentity.of(other),))
    prompts = PromptEncoder(torch.device("cpu"))
    prompts.encode(job, negative=False)
    prompts.encode(dataclasses.replace(job, model=model), negative=False)
    assert [Path(files[0]).name for files in loads] == ["umt5.safetensors", "other.safetensors"]


@pytest.mark.parametrize("reason", ["the group ends", "experts wait in host memory", "no room"])
def test_it_is_not_kept_where_it_would_be_in_the_way(
    reason: str, job: Job, loads: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    match reason:
        case "the group ends":
            job = changed(job, keep_warm_seconds=0.0)
        case "experts wait in host memory":
            job = changed(job, offload_model=True)
        case "no room":
            monkeypatch.setattr(module, "available_bytes", lambda: MODEL.stat().st_size)
    prompts = PromptEncoder(torch.device("cpu"))
    first, second = (prompts.encode(job, negative=False) for _ in range(2))
    assert len(loads) == 2
    assert torch.equal(first[0], second[0])
    assert prompts._encoder is None


def test_a_model_that_is_never_written_is_copied_to_the_host_once():
    model = torch.nn.Linear(3, 2)
    values = [parameter.detach().clone() for parameter in model.parameters()]
    parking = HostParking(model, keep=True)
    copies = []
    for _ in range(3):
        parking.park()
        assert parking.resident_bytes == 0 and parking.has_copy
        copies.append(parking._host.data_ptr())
        parking.fetch()
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), values, strict=True))
    assert len(set(copies)) == 1
    parking.drop()
    assert not parking.has_copy


def test_the_negative_prompt_is_the_jobs_own_and_wans_where_it_has_none(job: Job):
    prompts = PromptEncoder(torch.device("cpu"))

    def negative(words: str) -> torch.Tensor:
        asked = dataclasses.replace(job, text=Text(prompt="a cat", negative_prompt=words))
        return prompts.encode(asked, negative=True)[1]

    dog, default = negative("a dog"), negative("")
    assert torch.equal(dog, prompts.encode(dataclasses.replace(job, text=Text(prompt="a dog")), negative=False)[0])
    assert torch.equal(default, negative(text_encoder.DEFAULT_NEGATIVE_PROMPT))
    assert dog.shape != default.shape


def test_on_a_gpu_it_is_in_bfloat16_and_waits_in_host_memory(job: Job, monkeypatch: pytest.MonkeyPatch):
    """As long as the host has room for it twice, or holds it already."""
    made: list[dict[str, Any]] = []
    happens: list[str] = []
    size = sum(file.size for file in job.model.text_encoder)

    class Parked:
        def __init__(self, model: Any, *, keep: bool) -> None:
            assert model == "umT5" and keep
            self.has_copy = False

        def fetch(self) -> None:
            happens.append("fetched")

        def park(self) -> None:
            happens.append("parked")
            self.has_copy = True

        def drop(self) -> None:
            happens.append("dropped")

    tokenizer = SimpleNamespace(notes=lambda **prompts: [f"{name}: {text}" for name, text in prompts.items()])
    encoder = SimpleNamespace(model="umT5", tokenizer=tokenizer, encode=list)
    monkeypatch.setattr(
        text_encoder, "load_text_encoder", lambda *files, **how: (made.append({"files": files, **how}), encoder)[1]
    )
    monkeypatch.setattr(module, "HostParking", Parked)
    monkeypatch.setattr(module, "available_bytes", lambda: available)
    gpu, said = torch.device("cuda", 1), []
    prompts, available = PromptEncoder(gpu), 2 * size + 1
    assert prompts.encode(job, negative=False, say=said.append) == ["a cat walks on the grass"]
    assert said == ["loading the text encoder", "encoding the prompt"]
    assert prompts.notes == ["prompt: a cat walks on the grass"]
    available = 0
    prompts.encode(job, negative=True)
    assert happens == ["parked", "fetched", "parked"], "the host has it"
    assert prompts.notes[1] == f"negative_prompt: {text_encoder.DEFAULT_NEGATIVE_PROMPT}"
    files = tuple([file.path for file in some] for some in (job.model.text_encoder, job.model.tokenizer))
    assert made == [{"files": files, "dtype": torch.bfloat16, "device": gpu}]
    prompts.drop()
    happens.clear()
    available = 2 * size
    prompts.encode(job, negative=False)
    assert happens == ["dropped"] and len(made) == 2
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    prompts.encode(job, negative=False)
    assert happens[1:] == ["parked"], "a system that does not tell"
    cpu = PromptEncoder(torch.device("cpu"))
    cpu.encode(job, negative=False)
    assert made[-1] == {"files": files, "dtype": torch.float32, "device": torch.device("cpu")}
    assert happens[1:] == ["parked"], "there it is in host memory anyway"
