"""An expert that is read while another one runs, and what a rank frees: of models that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from made_up_models import cache_of_three, files
from wan_pack.distributed.job.job import FileIdentity, JobError, Parallel
from wan_pack.distributed.job.model_files import ExpertFiles, LoraFile
from wan_pack.distributed.parallel.parallelize import Computing
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import experts
from wan_pack.distributed.rank.expert import PendingExpert
from wan_pack.distributed.rank.experts import ExpertCache
from wan_pack.distributed.weights.warm_up import BesideReading


@pytest.fixture
def cache() -> ExpertCache:
    return cache_of_three()


class Reading:
    """In the place of a Prefetch."""

    def __init__(self, happens: list[Any]) -> None:
        self.happens = happens

    def stop(self, wait: float | None = None) -> None:
        self.happens.append(("stopped", wait))

    def check(self) -> None:
        raise OSError("x ended at byte 7")


def pending(cache: ExpertCache, name: str, happens: list[Any], made_of: Any = None) -> None:
    """An expert that is being read, beside the three models."""

    def finish(on_read: Any) -> None:
        happens.append("finished")
        on_read(3, 4)

    cache._pending[name] = PendingExpert(made_of, Reading(happens), finish)  # type: ignore[arg-type]


def test_after_a_cancel_what_was_still_being_read_goes_and_what_was_gathered(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """One that has no memory yet, as it takes the place of the other, is only no longer read."""
    happens: list[Any] = []
    pending(cache, "b", happens)
    pending(cache, "d", happens)
    left = [cache.models["a"], cache.models["c"]]
    released: list[Any] = []
    monkeypatch.setattr(experts, "release_gathered", released.append)
    with pytest.raises(OSError, match="byte 7"):
        cache.check_pending()
    cache.settle()
    assert happens == [("stopped", None)] * 2 and list(cache.models) == list(cache.weights) == ["a", "c"]
    assert released == left
    # Nothing is waited for any more.
    cache.check_pending()
    cache.arrive("b", lambda *_: pytest.fail("it is gone"))


def test_a_job_that_has_failed_waits_a_second_for_its_reading(cache: ExpertCache):
    happens: list[Any] = []
    pending(cache, "b", happens)
    cache.stop_reading()
    assert happens == [("stopped", 1.0)] and "b" in cache.models


def test_an_expert_arrives_once_and_all_its_files_are_as_they_were(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    happens: list[Any] = []
    clock = iter([5.0, 7.5])
    monkeypatch.setattr(experts, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    looked: list[str] = []
    monkeypatch.setattr(FileIdentity, "check_unchanged", lambda file: looked.append(file.path))
    lora = LoraFile(file=files("lora")[0], strength=1.0)
    made_of = ExpertFiles(files("b"), (lora,), None)
    pending(cache, "b", happens, made_of)
    told: list[Any] = []
    with caplog.at_level("INFO"):
        for _ in range(2):
            cache.arrive("b", lambda *given: told.append(given))
    assert happens == ["finished"] and told == [("b expert", 3, 4)]
    assert looked == ["/models/b.safetensors", "/models/lora.safetensors"]
    assert cache._made_of["b"] is made_of and not cache._pending
    assert caplog.messages == ["the steps waited 2.50 s for the b expert"]


@pytest.mark.parametrize("what", ["a model", "a LoRA"])
def test_a_file_that_is_replaced_while_it_is_read_makes_no_model(
    what: str, cache: ExpertCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a download or a training that has come to its end: of one half each there would be a video of nothing."""
    model, lora = tmp_path / "d.safetensors", tmp_path / "lora.safetensors"
    for path in (model, lora):
        path.write_bytes(b"old")
    wanted = ExpertFiles((FileIdentity.of(model),), (LoraFile(file=FileIdentity.of(lora), strength=1.0),), None)

    def load_expert(*_: Any, **__: Any) -> torch.nn.Module:
        new = tmp_path / "new"
        new.write_bytes(b"longer")
        new.replace(model if what == "a model" else lora)
        return torch.nn.Module()

    monkeypatch.setattr(experts, "load_expert", load_expert)
    with pytest.raises(JobError, match=f"{'d' if what == 'a model' else 'lora'}.safetensors changed since the job"):
        cache._load("d", wanted, {"parallel": stub_job().parallel, "mesh": None}, lambda done, total: None)
    assert "d" not in cache._made_of


def test_a_rank_that_keeps_nothing_frees_all(cache: ExpertCache, monkeypatch: pytest.MonkeyPatch):
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(cache.models)))
    held = dict(cache.weights)
    cache.drop()
    assert not cache.models and not cache.weights and not cache._made_of and emptied == [0]
    assert all(weights.dropped for weights in held.values())  # type: ignore[attr-defined]


def test_room_is_what_every_rank_has(cache: ExpertCache, monkeypatch: pytest.MonkeyPatch):
    """Alone what this one has; a rank counts with those that share its host's memory."""
    asked: list[Any] = []
    monkeypatch.setattr(experts, "free_bytes", lambda device, ranks: (asked.append((device, ranks)), 10)[1])
    assert cache.has_room(10, 3) and not cache.has_room(11, 3)
    assert asked == [(torch.device("cpu"), 3)] * 2
    said: list[Any] = []
    cache._mesh = SimpleNamespace(group="all")  # type: ignore[assignment]
    monkeypatch.setattr(experts, "everywhere", lambda *given: (said.append(given), False)[1])
    assert not cache.has_room(10, 3) and said == [(True, "all", torch.device("cpu"))]


class Loads:
    """A cache whose models are made up, and what is done with them."""

    def __init__(self, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.happens = cache, []
        cache.compute_by("kernel", "own", "exact")  # type: ignore[arg-type]
        monkeypatch.setattr(cache, "_load", self._load)
        monkeypatch.setattr(cache, "_read_ahead", lambda *given: (self.happens.append(("ahead", *given)), "pending")[1])
        monkeypatch.setattr(experts, "compute_as", lambda *given: self.happens.append(("computes", *given)))
        monkeypatch.setattr(experts, "set_shard", lambda *given: self.happens.append(("shard", *given)))
        for name, weights in cache.weights.items():
            weights.park = lambda name=name: self.happens.append(("parks", name))  # type: ignore
            weights.fetch = lambda name=name: self.happens.append(("comes", name))  # type: ignore

    def _load(self, name: str, wanted: Any, settings: Any, report: Any, beside: Any, on_send: Any) -> None:
        self.happens.append(("loads", name, wanted, settings, beside.use, on_send))

    def __call__(self, names: tuple[str, ...], wanted: dict[str, ExpertFiles], **settings: Any) -> list[Any]:
        self.parallel = Parallel(gpu_count=2, **settings)
        self.told: list[Any] = []
        self.beside = BesideReading(use=lambda model: None)
        self.cache.load(
            names, wanted, self.parallel, "mesh", SHARD, lambda *given: self.told.append(given), self.beside  # type: ignore
        )  # fmt: skip
        happens, self.happens[:] = list(self.happens), []
        return happens


SHARD = SequenceShard(length=6, rank=1, world=2)


def with_lora(name: str) -> ExpertFiles:
    return ExpertFiles(files(name), (LoraFile(file=files("lora")[0], strength=1.0),), None)


@pytest.mark.parametrize("parks", [True, False])
def test_what_is_stale_is_read_and_all_get_the_tokens_of_the_job(
    parks: bool, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """Both of them were there; the one that runs first is read last, and what goes on beside the first reading."""
    loads = Loads(cache, monkeypatch)
    wanted = {"a": with_lora("a"), "b": with_lora("b")}
    happens = loads(("a", "b"), wanted, offload_model=parks)
    computing = Computing.of(loads.parallel, "kernel", "own", "exact")  # type: ignore[arg-type]
    models = dict(cache.models)
    settings = {
        "parallel": loads.parallel, "mesh": "mesh", "shard": SHARD, "device": torch.device("cpu"),
        "attention": "kernel", "exact_attention": "exact", "ops": "own",
    }  # fmt: skip
    told = [("computes", models[name], "mesh", SHARD, computing) for name in "abc"]
    assert happens[:3] == told
    read = [one for one in happens if one[0] == "loads"]
    assert [one[1:4] for one in read] == [(name, wanted[name], settings) for name in "ba"]
    assert [one[4] for one in read] == [loads.beside.use, experts.NOTHING_BESIDE.use]
    read[0][5]()
    assert loads.told == [("sharing the weights", 0, 0)]
    parked = [one[1] for one in happens if one[0] == "parks"]
    assert sorted(parked) == (["a", "b", "c", "c"] if parks else [])
    assert [one for one in happens if one[0] in ("shard", "comes")] == (
        [("shard", models["a"], SHARD), ("shard", models["b"], SHARD)] if parks else
        [("shard", models["a"], SHARD), ("comes", "a"), ("shard", models["b"], SHARD), ("comes", "b")]
    )  # fmt: skip
    # A second time nothing is told anew, and what is there stays.
    cache._made_of |= wanted
    again = loads(("b",), wanted, offload_model=parks)
    assert again == [("shard", models["b"], SHARD), *([] if parks else [("comes", "b")])]
    other = loads(("b",), wanted, offload_model=parks, memory_optimization=True)
    assert [one[0] for one in other[:3]] == ["computes"] * 3


def test_the_second_of_two_new_experts_is_read_while_the_first_runs(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    loads = Loads(cache, monkeypatch)
    wanted = {name: ExpertFiles(files(name), (), None) for name in ("c", "d", "e")}
    happens = loads(("c", "e"), wanted)
    assert [(one[0], one[1]) for one in happens if one[0] != "computes"][-1] == ("ahead", "e")
    ahead = happens[-1]
    assert ahead[2] == wanted["e"] and ahead[3]["shard"] == SHARD and cache._pending == {"e": "pending"}
    assert not [one for one in happens if one[0] == "loads"], "the first is there"


def test_a_model_in_whose_place_another_file_lies_is_let_go_before_anything_is_loaded(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    loads = Loads(cache, monkeypatch)
    (file,) = files("b")
    held = cache.weights["b"]
    loads(("a",), {"a": ExpertFiles(files("a"), (), None), "x": ExpertFiles((replace(file, size=2),), (), None)})
    assert held.dropped and list(cache.models) == ["a", "c"]  # type: ignore[union-attr]


@pytest.mark.parametrize("stays", [True, False])
def test_an_expert_that_takes_the_place_of_the_others_gets_their_memory(
    stays: bool, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """Its files are read ahead by the ranks of each machine together; it stops when it is wanted."""
    happens: list[Any] = []
    cache._rank = 3
    for name in "abc":
        cache.weights[name].park = lambda name=name: happens.append(("parks", name))  # type: ignore
        cache.weights[name].hand_over = lambda name=name: [f"slab of {name}"]  # type: ignore
    reading = SimpleNamespace(stop=lambda: happens.append("stops"), check=lambda: happens.append("looks"))
    monkeypatch.setattr(experts, "prefetch_files", lambda files, **how: (happens.append((files, how)), reading)[1])
    monkeypatch.setattr(cache, "_load", lambda *given: happens.append(given))
    parallel = Parallel(gpu_count=4, hosts=(), offload_model=True, keep_warm_seconds=9.0 if stays else 0.0)
    wanted = with_lora("d")
    pending = cache._read_ahead("d", wanted, {"parallel": parallel, "x": 1})
    assert happens == [(wanted.files, {"part": 3, "parts": 4})] and pending.made_of is wanted
    happens.clear()
    pending.finish(print)
    slabs = [] if stays else ["slab of a", "slab of b", "slab of c"]
    assert happens == [
        "stops", "looks", *([("parks", name) for name in "abc"] if stays else []),
        ("d", wanted, {"parallel": parallel, "x": 1, "slabs": slabs}, print),
    ]  # fmt: skip
    assert bool(cache.models) is stays


def test_an_expert_that_has_its_own_place_is_built_at_once_and_shared_when_it_is_read(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    happens: list[Any] = []

    def read(*, on_tensor: Any) -> None:
        on_tensor(2, 3)
        happens.append("read")

    built = SimpleNamespace(model="model", weights="weights", read=read, send=lambda: happens.append("shared"))
    monkeypatch.setattr(experts, "build_expert", lambda *of, **how: (happens.append((of, how)), built)[1])
    wanted = ExpertFiles(files("d"), (), "low_noise")
    pending = cache._read_ahead("d", wanted, {"parallel": Parallel(gpu_count=2), "ops": "own"})
    assert (cache.models["d"], cache.weights["d"]) == ("model", "weights")
    assert happens[0] == (
        (wanted.paths, wanted.specs), {"expert": "low_noise", "parallel": Parallel(gpu_count=2), "ops": "own"}
    )  # fmt: skip
    told: list[Any] = []
    pending.finish(lambda *given: told.append(given))
    assert happens[1:] == ["read", "shared"] and set(told) <= {(0, 1), (2, 3)}
