"""How a model is built for a job, and what the sampling loop's question becomes for it: models that only note it."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TINY
from torch import Tensor
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.job.sampling import RoundedTimesteps
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import expert
from wan_pack.distributed.rank.expert import VelocityPredictor, take_turn
from wan_pack.distributed.weights.warm_up import BesideReading
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.model.selection import EVERYTHING
from wan_pack.wan.transformer.conditions import Beside, Conditions
from wan_pack.wan.transformer.context import Context, pad_text

CPU, GRID = torch.device("cpu"), (2, 2, 3)
SHARD = SequenceShard(length=12, rank=1, world=3)


class Model:
    """Notes what it is asked, and whether to compute exactly; makes twice the tokens."""

    def __init__(self, happens: list[Any], name: str) -> None:
        self.config, self.happens, self.name = TINY, happens, name
        self.asked: list[tuple[Any, ...]] = []

    def compute_exactly(self, exact: bool) -> None:
        self.happens.append((self.name, "exact" if exact else "rounded"))

    def __call__(self, *asked: Any) -> Tensor:
        self.asked.append(asked)
        return 2 * asked[0]

    def modules(self) -> list[Any]:
        return [SimpleNamespace(reshard=lambda: self.happens.append((self.name, "released"))), SimpleNamespace()]


@pytest.fixture
def happens() -> list[Any]:
    return []


@pytest.fixture
def models(happens: list[Any]) -> dict[str, Model]:
    return {name: Model(happens, name) for name in ("high_noise", "low_noise")}


def predictor(models: dict[str, Model], happens: list[Any], **changes: Any) -> VelocityPredictor:
    settings: dict[str, Any] = {
        "grid": GRID, "shard": SHARD, "device": CPU, "keep_text": True, "weights": {},
        "arrive": lambda name: happens.append((name, "arrives")),
        "rounded": RoundedTimesteps(above=100.0, below=900.0),
    }  # fmt: skip
    texts = {True: torch.ones(3, 48), False: torch.full((600, 48), 2.0)}
    return VelocityPredictor(models, texts, **settings | changes)  # type: ignore[arg-type]


def test_a_pass_has_its_text_its_timestep_and_the_places_of_the_ranks_tokens(
    models: dict[str, Model], happens: list[Any]
) -> None:
    asking = predictor(models, happens)
    tokens = torch.randn(4, 64)
    found = asking.predict("high_noise", tokens, 812.3, (True, False))
    assert len(found) == 2 and all(torch.equal(one, 2 * tokens) for one in found)
    for (given, timestep, text, rope, which, beside), words in zip(
        models["high_noise"].asked, (torch.ones(3, 48), torch.full((512, 48), 2.0)), strict=True
    ):
        assert torch.equal(given, tokens) and which is None and beside == Beside()
        assert torch.equal(timestep, torch.tensor([812.3])) and timestep.dtype == torch.float32
        assert torch.equal(text.tokens, pad_text(words)) and text.keep
        assert all(map(torch.equal, rope, rope_table(GRID, TINY.head_dim, start=4, stop=8)))
    asking.predict("high_noise", tokens, 812.3, (False,))
    last = models["high_noise"].asked[-1]
    assert last[2] is models["high_noise"].asked[1][2], "what is derived of a text stays from step to step"


def test_places_follow_the_order_of_the_tokens(models: dict[str, Model], happens: list[Any]) -> None:
    order = torch.arange(11, -1, -1)
    shard = SequenceShard(length=12, rank=1, world=3, order=order)
    predictor(models, happens, shard=shard).predict("low_noise", torch.zeros(4, 64), 1.0, (True,))
    whole = rope_table(GRID, TINY.head_dim)
    (asked,) = models["low_noise"].asked
    assert all(torch.equal(part, all_of_them[order[4:8]]) for part, all_of_them in zip(asked[3], whole, strict=True))


def test_tokens_that_are_given_have_timestep_0(models: dict[str, Model], happens: list[Any]) -> None:
    which = torch.tensor([0, 1, 1, 0])
    predictor(models, happens, which_timestep=which).predict("low_noise", torch.zeros(4, 64), 33.25, (True,))
    (asked,) = models["low_noise"].asked
    assert asked[1].tolist() == [0.0, 33.25] and asked[4] is which


def test_channels_of_a_picture_go_behind_the_latents_at_each_position(
    models: dict[str, Model], happens: list[Any]
) -> None:
    """Four positions of a token: of each 2 channels of latents, then 3 of the picture."""
    tokens = torch.arange(4 * 8.0).view(4, 8)
    image = -torch.arange(4 * 12.0).view(4, 12)
    asking = predictor(models, happens, conditions=Conditions(image=image))
    asking.predict("low_noise", tokens, 1.0, (True,))
    ((given, *_),) = models["low_noise"].asked
    expected = [
        [*tokens[row, 2 * at : 2 * at + 2].tolist(), *image[row, 3 * at : 3 * at + 3].tolist()]
        for row in range(4) for at in range(4)
    ]  # fmt: skip
    assert given.view(16, 5).tolist() == expected and given.shape == (4, 20)


@pytest.mark.parametrize("keep", [True, False])
def test_what_the_negative_prompt_is_told_instead_goes_with_its_pass(
    keep: bool, models: dict[str, Model], happens: list[Any]
) -> None:
    seen, other = Context(torch.ones(2, 4)), Context(torch.zeros(2, 4))
    conditions = Conditions(picture=seen, instead={"picture": other})
    asking = predictor(models, happens, conditions=conditions, keep_text=keep)
    asking.predict("low_noise", torch.zeros(4, 64), 1.0, (False, True))
    pictures = [asked[5].picture for asked in models["low_noise"].asked]
    assert [picture.tokens.unique().item() for picture in pictures] == [0.0, 1.0]
    assert all(part.keep is keep for part in (*pictures, *(asked[2] for asked in models["low_noise"].asked)))


def test_an_expert_takes_over_once_and_lets_go_what_was_gathered_before(
    models: dict[str, Model], happens: list[Any]
) -> None:
    """Steps at the ends of the schedule are exact."""
    asking = predictor(models, happens)
    released = [("high_noise", "released"), ("low_noise", "released")]
    for name, timestep in (("high_noise", 950.0), ("high_noise", 700.0), ("low_noise", 20.0)):
        asking.predict(name, torch.zeros(4, 64), timestep, (True,))
    assert happens == [
        *released, ("high_noise", "arrives"), ("high_noise", "exact"), ("high_noise", "rounded"),
        *released, ("low_noise", "arrives"), ("low_noise", "exact"),
    ]  # fmt: skip
    first, second = models["high_noise"].asked[0][2], models["low_noise"].asked[0][2]
    assert first is not second, "each expert derives its own of a text"
    happens.clear()
    asking.release()
    assert happens == released


class Weights:
    def __init__(self, name: str, happens: list[Any], size: int) -> None:
        self.name, self.happens, self.resident_bytes = name, happens, size

    def park(self) -> None:
        self.happens.append(f"{self.name} parks")
        self.resident_bytes = 0

    def fetch(self) -> None:
        self.happens.append(f"{self.name} comes")


def test_the_others_leave_the_device_before_one_comes(
    models: dict[str, Model], happens: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    weights: Any = {
        name: Weights(name, happens, size << 30) for name, size in (("low_noise", 7), ("high_noise", 3))
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        take_turn(weights, "high_noise")
    assert happens == ["low_noise parks", "high_noise comes"]
    assert caplog.messages == ["offload: high_noise expert on the device (3.00 GiB), the other in host memory"]
    caplog.clear()
    del weights["low_noise"]
    with caplog.at_level(logging.INFO):
        take_turn(weights, "high_noise")
        take_turn({}, "high_noise")
    assert caplog.messages == ["offload: high_noise expert on the device (3.00 GiB)"]
    # One that is not held goes on with what there is.
    happens.clear()
    take_turn(weights, "another")
    assert happens == ["high_noise parks"]
    asking = predictor(models, happens, weights=weights)
    asking.predict("high_noise", torch.zeros(4, 64), 1.0, (True,))
    assert happens[-2:] == ["high_noise comes", ("high_noise", "exact")]


def test_all_that_a_job_says_reaches_the_model_that_is_built(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    device = torch.device("cpu")
    checkpoint = SimpleNamespace(describe=lambda weights: f"of {weights}", shapes={"w": (1,)})
    monkeypatch.setattr(expert, "Checkpoint", lambda files: (seen.update(files=files), checkpoint)[1])
    loras: list[Any] = []
    monkeypatch.setattr(expert, "Lora", lambda *of, **how: (loras.append((*of, how)), SimpleNamespace(report=str))[1])
    keeping = SimpleNamespace(weights=lambda checkpoint, loras: len(loras))
    monkeypatch.setattr(expert, "keeping_of", lambda parallel: keeping)
    monkeypatch.setattr(expert, "empty_model", lambda *of: (seen.update(empty=of[1:]), "model")[1])
    monkeypatch.setattr(expert, "parallelize_wan", lambda *of, **how: seen.update(of=of, how=how))
    reading = SimpleNamespace(
        read=lambda *of, **how: seen.update(read=(*of, how)), send=lambda *of, **how: seen.update(sent=(*of, how))
    )  # fmt: skip
    monkeypatch.setattr(expert, "SharedReading", SimpleNamespace(of=lambda *of: (seen.update(shared=of), reading)[1]))
    parallel = Parallel(
        gpu_count=2, mixed_precision="fp16", gather="expert", ulysses_engine="packed", torch_compile=True,
        memory_optimization=True, exact_blocks="2", stream_blocks=True,
    )  # fmt: skip
    monkeypatch.setattr(expert, "BlockStream", lambda *of: (seen.update(stream=of), Stream())[1])
    spans: list[str] = []

    class Stream:
        def writable(self) -> Any:
            return contextlib.nullcontext()

    @contextlib.contextmanager
    def span(name: str) -> Any:
        spans.append(name)
        yield

    told: list[Any] = []
    beside = BesideReading(use=lambda model: told.append(model), span=span)
    made = expert.load_expert(
        ["f"], [("a", 0.5), ("b", 1.0, "some")], parallel=parallel, mesh="mesh", shard="shard", device=device,
        expert="low_noise", attention="kernel", exact_attention="exact", ops="own", slabs=["slab"], on_tensor="tensors",
        beside=beside, on_send="sending", on_weights=told.append,
    )  # fmt: skip
    assert made == "model" and seen["files"] == ["f"] and seen["empty"][:1] == (torch.float16,)
    assert seen["empty"][2] is keeping and len(seen["empty"][1]) == 2
    assert loras == [
        ("a", 0.5, {"w": (1,)}, {"expert": "low_noise", "selection": EVERYTHING}),
        ("b", 1.0, {"w": (1,)}, {"expert": "low_noise", "selection": "some"}),
    ]  # fmt: skip
    assert seen["of"] == ("model", "mesh") and seen["how"] == {
        "shard": "shard", "attention": "kernel", "use_fsdp": False, "gather": "expert", "ulysses_engine": "packed",
        "torch_compile": True, "memory_optimization": True, "ops": "own", "exact_attention": "exact",
        "exact_blocks": (2,),
    }  # fmt: skip
    assert seen["stream"] == ("model", device, ["slab"]) and seen["shared"] == (parallel, "mesh", device)
    model, opened, how = seen["read"]
    assert (model, opened, how["device"], how["on_tensor"]) == ("model", checkpoint, device, "tensors")
    how["meanwhile"]()
    assert told[0].__class__ is Stream and told[1] == "model"
    assert len(how["loras"]) == 2 and seen["sent"] == ("model", {"on_send": "sending"})
    assert spans == ["model built", "weights read", "weights shared"]
