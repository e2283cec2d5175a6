"""Models that a rank keeps from one sampling to the next, as far as there is room."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from jobs import stub_job
from made_up_models import SIZE, Weights, cache_of_three, files
from wan_pack.distributed.job.job import FileIdentity, Parallel
from wan_pack.distributed.job.model_files import ExpertFiles, LoraFile, ModelFiles
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import experts
from wan_pack.distributed.rank.experts import ExpertCache
from wan_pack.wan.model.attention import attention


@pytest.fixture
def cache() -> ExpertCache:
    return cache_of_three()


def free_of(cache: ExpertCache, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    """The device has this much, of which models have taken theirs."""
    monkeypatch.setattr(
        experts, "free_bytes", lambda device, ranks: total - sum(each.resident_bytes for each in cache.weights.values())
    )


@pytest.mark.parametrize(("needed", "left"), [(5, "abc"), (6, "bc"), (15, "bc"), (16, "c"), (99, "")])
def test_those_used_longest_ago_make_room(needed: int, left: str, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch):
    free_of(cache, monkeypatch, total=3 * SIZE + 5)
    dropped = dict(cache.weights)
    cache.make_room(needed, but="d", parks=False, ranks=1)
    assert "".join(cache.models) == left
    assert all(weights.dropped is (name not in left) for name, weights in dropped.items())


def test_what_was_used_just_now_stays_longest_and_the_one_at_work_always(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    free_of(cache, monkeypatch, total=3 * SIZE)
    assert cache.named(files("a")) == "a"
    cache.make_room(SIZE, but="c", parks=False, ranks=1)
    assert list(cache.models) == ["a", "c"]
    cache.make_room(1000, but="c", parks=False, ranks=1)
    assert list(cache.models) == ["c"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("sharing", [1, 2])
def test_models_wait_in_the_hosts_memory_where_that_is_another_one_and_has_room(
    sharing: int, room: bool, parks: bool, device: str, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """`parks`: all but one go. Else the first of them makes room for what is needed. Each rank has its part of it."""
    cache._device = torch.device(device)
    free_of(cache, monkeypatch, total=3 * SIZE)
    # A tenth of the host's memory is left alone.
    monkeypatch.setattr(experts, "free_host_bytes", lambda ranks: (SIZE / 0.9 + (1 if room else -1)) * sharing / ranks)
    cache.make_room(SIZE, but="c", parks=parks, ranks=sharing)
    on_device = [name for name in cache.models if cache.is_on_device(name)]
    assert on_device == (["c"] if parks else ["b", "c"])
    waits = room and (parks or device == "cuda")
    assert list(cache.models) == (["a", "b", "c"] if waits else on_device)
    # What waits is not asked again, and is no longer there when it is.
    cache.make_room(SIZE, but="c", parks=parks, ranks=sharing)
    assert not cache.is_on_device("a")


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("mine", [True, False])
def test_a_model_waits_on_all_ranks_or_on_none(
    mine: bool, others: bool, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """Or those that let it go would read it while the others wait for them."""
    asked: list[bool] = []
    monkeypatch.setattr(cache, "_everywhere", lambda seen: (asked.append(seen), seen and others)[1])
    monkeypatch.setattr(experts, "free_host_bytes", lambda ranks: 10 * SIZE if mine else 0)
    cache.make_room(SIZE, but="c", parks=True, ranks=2)
    assert asked == [mine] * 2, "every rank is asked, whatever it sees itself"
    assert list(cache.models) == (["a", "b", "c"] if mine and others else ["c"])


def test_two_files_of_one_name_are_two_models(cache: ExpertCache):
    other = (FileIdentity(path="/elsewhere/a.safetensors", size=1, mtime_ns=1),)
    assert cache.named(other) not in cache.models
    shards = tuple(FileIdentity(path=f"/wan/high/{n}.safetensors", size=1, mtime_ns=1) for n in (1, 2))
    assert cache.named(shards) == "high"


def test_a_model_whose_file_was_replaced_is_let_go_and_not_kept_beside_the_new_one(cache: ExpertCache):
    before = dict(cache.weights)
    changed = (dataclasses.replace(files("b")[0], mtime_ns=2),)
    assert cache.named(changed) == "b"
    assert before["b"].dropped and list(cache.models) == ["a", "c"]
    assert not before["a"].dropped and not before["c"].dropped
    # Of several files one is enough.
    parts = (*files("d"), *files("e"))
    name = cache.named(parts)
    cache.models[name], cache.weights[name] = torch.nn.Module(), Weights()  # type: ignore[assignment]
    cache._made_of[name] = ExpertFiles(parts, (), None)
    assert cache.named(files("e")) == "e" and name in cache.models, "the same file in another model is no change"
    cache.named((dataclasses.replace(files("e")[0], size=2),))
    assert name not in cache.models


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_whether_lora_files_are_still_there_is_what_all_ranks_saw(
    there: bool, holds: bool, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """Also what has no place for its new LoRAs is read anew. One that does would wait for those that change theirs."""
    asked: list[bool] = []
    held: Any = cache.weights["a"]
    monkeypatch.setattr(cache, "_everywhere", lambda mine: (asked.append(mine), there)[1])
    monkeypatch.setattr(cache.weights["a"], "writable", contextlib.nullcontext, raising=False)
    done: list[str] = []
    monkeypatch.setattr(experts, "relora_expert", lambda *_, **__: not done.append("changed") and holds)
    monkeypatch.setattr(experts, "load_expert", lambda *_, **__: (done.append("loaded"), torch.nn.Module())[1])
    monkeypatch.setattr(FileIdentity, "check_unchanged", lambda file: None)
    settings = {"parallel": stub_job().parallel, "mesh": None}
    cache._load("a", ExpertFiles(files("a"), (), None), settings, lambda done, total: None)
    assert asked == [True] and done == ["changed"] * there + ["loaded"] * (not (there and holds))
    assert held.dropped is not (there and holds)


def test_before_a_job_models_that_lie_otherwise_and_cannot_move_go(cache: ExpertCache):
    def parallel(**settings: Any) -> Parallel:
        return Parallel(gpu_count=2, **settings)

    cache._parallel = parallel()
    for same in (parallel(), parallel(cfg_parallel=True, ulysses_engine="packed", offload_model=True)):
        cache.prepare(same)
        assert all(cache.is_on_device(name) for name in "abc")
    held = dict(cache.weights)
    cache.prepare(parallel(use_fsdp=True))
    assert not cache.models and all(weights.dropped for weights in held.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"use_fsdp": True}, True),
        ({"use_fsdp": True, "linear_precision": "int8"}, False),
        ({"stream_blocks": True}, False),
    ],
    ids=str,
)
def test_before_a_job_that_only_shards_models_on_the_device_are_moved_and_not_read_again(
    change: dict[str, Any], moves: bool, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
):
    """One that waits in host memory is let go, and so is one for which there is no room."""
    asked: list[Any] = []

    def resharded(model: Any, mesh: Any, parallel: Parallel, device: torch.device) -> Any:
        asked.append(model)
        return None if model is held["c"] else (torch.nn.Identity(), Weights())

    held, parked = dict(cache.models), cache.weights["b"]
    monkeypatch.setattr(experts, "resharded", resharded)
    parked.park()
    cache._parallel, cache._computes = Parallel(gpu_count=2), (None, False, None)  # type: ignore[assignment]
    cache.prepare(Parallel(gpu_count=2, **change))
    assert asked == ([held["a"], held["c"]] if moves else [])
    assert list(cache.models) == list(cache.weights) == list(cache._made_of) == (["a"] if moves else [])
    if moves:
        assert isinstance(cache.models["a"], torch.nn.Identity) and cache.is_on_device("a")
        assert cache._computes is None, "it is told how to compute before it does"


@pytest.mark.parametrize("low", ["l", "x", ""])
@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("order", [("low_noise", "high_noise"), ("high_noise", "low_noise")])
def test_before_a_video_another_models_experts_go_and_of_the_others_the_first_to_run_stays_on_the_device(
    order: tuple[str, str], parks: bool, low: str
):
    cache = ExpertCache(0, torch.device("cpu"), attention, "plain")
    for name, file in [(name, name[0]) for name in order]:
        cache.models[name] = torch.nn.Module()  # type: ignore[assignment]
        cache.weights[name] = Weights()  # type: ignore[assignment]
        cache._made_of[name] = ExpertFiles(files(file), (), name)
    held = dict(cache.weights)
    one = ModelFiles(high_noise=files("h"), low_noise=files(low) if low else (), vae=files("v"))
    cache.keep_only(one)
    if parks:
        cache.park_later()
    assert set(cache.models) == ({"high_noise", "low_noise"} if low == "l" else {"high_noise"})
    assert held["low_noise"].dropped is (low != "l")  # type: ignore[attr-defined]
    assert cache.is_on_device("high_noise")
    assert cache.is_on_device("low_noise") is (low == "l" and not parks)


def test_models_of_one_file_name_are_told_apart(cache: ExpertCache):
    names = [cache.named(files(f"{folder}/a")) for folder in ("other",)]
    cache._made_of[names[0]] = ExpertFiles(files("other/a"), (), None)
    names.append(cache.named(files("third/a")))
    assert names == ["a 2", "a 3"] and cache.named(files("a")) == "a" and cache.named(files("other/a")) == "a 2"


def test_how_far_the_reading_of_two_experts_is(cache: ExpertCache, monkeypatch: pytest.MonkeyPatch):
    """Of both together: the one that runs first is read last."""
    told: list[tuple[str, int, int]] = []

    def read(name: str, wanted: object, settings: object, report: Any, *_: object) -> None:
        for done in (1, 2, 3):
            report(done, 3)

    monkeypatch.setattr(cache, "_load", read)
    for name in ("compute_as", "set_shard"):
        monkeypatch.setattr(experts, name, lambda *_: None)
    lora = LoraFile(file=files("lora")[0], strength=1.0)
    wanted = {name: ExpertFiles(files(name), (lora,), None) for name in ("a", "b")}
    cache.load(
        ("a", "b"), wanted, Parallel(gpu_count=1, offload_model=True), None, SequenceShard(length=6),
        lambda *given: told.append(given),
    )  # fmt: skip
    assert told == [(f"{name} expert", done, 6) for name, done in zip("bbbaaa", range(1, 7), strict=True)]
