"""A call of ComfyUI's -> what the evaluator is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.job.evaluator import SampleConditioning
from wan_pack.nodes.core.evaluation import Evaluation


class Asked:
    """An evaluator that doubles the latents."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Sequence[SampleConditioning]]] = []
        self.closed = 0

    def evaluate(self, x: Tensor, timesteps: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        self.calls.append((x, timesteps, samples))
        return 2 * x

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def evaluation(asked: Asked) -> Evaluation:
    given: Any = asked
    return Evaluation(lambda: given)


def contexts(*values: float) -> Tensor:
    return torch.stack([torch.full((3, 4), value) for value in values])


@pytest.mark.parametrize(
    ("given", "expected"),
    [([7.0], [7.0, 7.0]), ([7.0, 3.0], [7.0, 3.0]), ([[7.0, 0.0], [3.0, 1.0]], [[7.0, 0.0], [3.0, 1.0]])],
)
def test_each_sample_has_its_own_timestep(asked: Asked, evaluation: Evaluation, given: Any, expected: Any) -> None:
    """Or one is for all; by frame where ComfyUI gives them so."""
    x = torch.randn(2, 16, 2, 2, 2)
    out = evaluation.velocity(x, torch.tensor(given, dtype=torch.float64), contexts(1, 2), {}, {})
    assert torch.equal(out, 2 * x)
    assert asked.calls[0][1].dtype == torch.float32 and asked.calls[0][1].tolist() == expected


@pytest.mark.parametrize("size", [(3, 4), (4, 5), (5, 7), (4, 6)])
def test_an_area_of_odd_size_is_padded_with_its_other_edge(
    asked: Asked, evaluation: Evaluation, size: tuple[int, int]
) -> None:
    """As ComfyUI's model pads it, and what comes back is cut to it."""
    x = torch.randn(1, 16, 2, *size)
    assert torch.equal(evaluation.velocity(x, torch.ones(1), contexts(1), {}, {}), 2 * x)
    rows, columns = size
    whole = asked.calls[0][0]
    assert whole.shape[-2:] == (rows + rows % 2, columns + columns % 2)
    assert torch.equal(whole[..., :rows, :columns], x) and whole.is_contiguous()
    if rows % 2:
        assert torch.equal(whole[..., rows, :columns], x[..., 0, :])
    if columns % 2:
        assert torch.equal(whole[..., :rows, columns], x[..., 0])


@pytest.mark.parametrize(
    ("prompts", "count", "conditional"),
    [
        ([0, 1], 4, [True, True, False, False]),
        ([1, 0], 4, [False, False, True, True]),
        ([1], 2, [False, False]),
        ([0], 2, [True, True]),
        (None, 2, [True, True]),
        # A wrapper around the model took a part of the batch.
        ([0, 1], 3, [True, True, True]),
        # Of three prompts, of which two are asked for.
        ([0, 0, 1], 3, [True, True, False]),
    ],
)
def test_which_samples_are_of_the_prompt(
    asked: Asked, evaluation: Evaluation, prompts: Any, count: int, conditional: list[bool]
) -> None:
    options = {} if prompts is None else {"cond_or_uncond": prompts}
    evaluation.velocity(torch.zeros(count, 16, 1, 2, 2), torch.ones(1), contexts(*range(count)), options, {})
    samples = asked.calls[0][2]
    assert [sample.conditional for sample in samples] == conditional
    assert [sample.text[0, 0].item() for sample in samples] == list(range(count))


def test_one_text_is_for_all_samples(asked: Asked, evaluation: Evaluation) -> None:
    evaluation.velocity(torch.zeros(3, 16, 1, 2, 2), torch.ones(3), contexts(5), {}, {})
    (first, *others) = (sample.text for sample in asked.calls[0][2])
    assert first[0, 0] == 5 and all(other is first for other in others)


def test_the_evaluator_starts_with_the_first_call_and_ends_with_the_sampling(asked: Asked) -> None:
    started: list[int] = []

    def start() -> Any:
        started.append(1)
        return SimpleNamespace(evaluate=asked.evaluate, close=asked.close)

    unused = Evaluation(start)
    unused.close()
    assert (started, asked.closed) == ([], 0)
    used = Evaluation(start)
    for _ in range(2):
        used.velocity(torch.zeros(1, 16, 1, 2, 2), torch.ones(1), contexts(1), {}, {})
    used.close()
    assert (started, asked.closed) == ([1], 1)


def test_what_is_remembered_is_not_what_comfyui_writes_to_later(asked: Asked, evaluation: Evaluation) -> None:
    """Its own buffers, one after another with other values."""
    text = contexts(1.0)
    for value in (1.0, 2.0, 1.0):
        text.fill_(value)
        evaluation.velocity(torch.zeros(1, 16, 1, 2, 2), torch.ones(1), text, {}, {})
    first, second, third = (call[2][0].text for call in asked.calls)
    assert third is first and [first[0, 0].item(), second[0, 0].item()] == [1.0, 2.0]
