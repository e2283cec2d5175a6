"""What a sampling of ComfyUI's says of itself, by which it is planned and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from wan_pack.nodes.host.core_model import CoreSampling


class Windows:
    """A handler of ComfyUI's."""

    context_length, dim = 5, 2


def sampling(
    conds: dict[str, Any], options: dict[str, Any] | None = None, guidance: float | None = 5.0
) -> CoreSampling:
    return CoreSampling(None, conds, options or {}, (1, 16, 9, 6, 8), torch.zeros(2), guidance)


def text(tokens: int, **more: Any) -> dict[str, Any]:
    return {"cross_attn": torch.zeros(1, tokens, 4), **more}


def test_a_picture_in_front_of_any_entry_is_one_in_front() -> None:
    pictured, plain = text(9, reference_latents=[torch.zeros(1)]), text(9)
    for conds, found in (
        ({}, False), ({"positive": [plain], "negative": [plain]}, False), ({"positive": []}, False),
        ({"positive": [plain, pictured], "negative": [plain]}, True), ({"middle": [pictured]}, True),
        ({"positive": [text(9, reference_latents=None)]}, False),
    ):  # fmt: skip
        assert sampling(conds).references is found, conds


def test_of_a_chain_of_controls_the_longest_counts() -> None:
    """Those of another entry are of another evaluation; where none is given there is an empty one."""
    conds = {
        "positive": [text(9), text(9, vace_frames=[0] * 2)], "negative": [text(9, vace_frames=[0] * 3)],
        "other": [text(9, vace_frames=None)],
    }  # fmt: skip
    assert sampling(conds).controls == 3
    assert sampling({"positive": [text(9)]}).controls == sampling({}).controls == 1


def test_a_window_is_of_its_own_axis_and_no_longer_than_the_video() -> None:
    for length, dim, window in ((5, 2, (1, 16, 5, 6, 8)), (5, 4, (1, 16, 9, 6, 5)), (20, 2, (1, 16, 9, 6, 8))):
        handler = Windows()
        handler.context_length, handler.dim = length, dim
        assert sampling({}, {"context_handler": handler}).window == window
    assert sampling({}).window == (1, 16, 9, 6, 8)


@pytest.mark.parametrize(
    ("positive", "negative", "options", "guidance", "guided"),
    [
        ([9], [9], {}, 5.0, True),
        ([9, 9], [9], {}, None, True),
        ([9], [9], {}, 1.0, False),
        ([9], [9], {"disable_cfg1_optimization": True}, 1.0, True),
        ([9], [7], {}, 5.0, False),
        ([9, 7], [9], {}, 5.0, False),
        ([9], [], {}, 5.0, False),
        ([], [9], {}, 5.0, False),
        ([], [], {}, 5.0, False),
    ],
)
def test_both_prompts_are_one_evaluation_where_they_have_as_many_tokens(
    positive: list[int], negative: list[int], options: dict[str, Any], guidance: float | None, guided: bool
) -> None:
    conds = {"positive": [*map(text, positive)], "negative": [*map(text, negative)]}
    assert sampling(conds, options, guidance).guided is guided
    conds["third"] = [text(3)]
    assert sampling(conds, options, guidance).guided is guided, "another one is no side of it"
