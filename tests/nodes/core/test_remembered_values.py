"""What one sampling remembers of ComfyUI's values: the same object while they come again, and a bounded number."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.job.evaluator import KEPT_AT_LEAST, SampleConditioning
from wan_pack.nodes.core import evaluation as evaluations
from wan_pack.nodes.core.evaluation import Evaluation


def test_texts_of_the_last_evaluations_are_the_same_objects_and_older_ones_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluations, "KEPT_ROW_BYTES", 5 * KEPT_AT_LEAST)
    seen: list[Any] = []

    def evaluate(x: Tensor, _: Tensor, samples: Sequence[SampleConditioning]) -> Tensor:
        seen.append(samples[0].text)
        return x

    evaluation = Evaluation(lambda: SimpleNamespace(evaluate=evaluate))  # type: ignore[arg-type, return-value]
    for number in (*range(5), 0, 5, 0, 2):
        evaluation.velocity(torch.zeros(1, 16, 1, 2, 2), torch.ones(1), torch.full((1, 3, 4), float(number)), {}, {})
    *texts, again, _, forgotten, recent = seen
    assert again is texts[0] and recent is texts[2], "copies with the same values"
    assert forgotten is not texts[0] and torch.equal(forgotten, texts[0]), "it made place for the newest"
