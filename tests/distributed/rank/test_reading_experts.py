"""An expert that is read while another one runs, and what a rank frees: of models that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wan_pack.distributed.job.job import FileIdentity
from wan_pack.distributed.job.model_files import ExpertFiles, LoraFile
from wan_pack.distributed.rank import experts
from wan_pack.distributed.rank.expert import PendingExpert
from wan_pack.distributed.rank.experts import ExpertCache
from wan_pack.wan.model.attention import attention


class Weights:
    resident_bytes, dropped = 10, False

    def drop(self) -> None:
        self.dropped = True


def files(name: str) -> tuple[FileIdentity, ...]:
    return (FileIdentity(path=f"/models/{name}.safetensors", size=1, mtime_ns=1),)


@pytest.fixture
def cache() -> ExpertCache:
    """With three models."""
    cache = ExpertCache(0, torch.device("cpu"), attention, "plain")
    for name in ("a", "b", "c"):
        cache.models[name], cache.weights[name] = torch.nn.Module(), Weights()  # type: ignore[assignment]
        cache._made_of[name] = ExpertFiles(files(name), (), None)
    return cache


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
