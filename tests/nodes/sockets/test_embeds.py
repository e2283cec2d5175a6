"""Text embeddings of every form that other nodes hand on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from node_inputs import rows
from wan_pack.nodes.sockets import embeds


@pytest.mark.parametrize(
    "value",
    [
        {"prompt_embeds": [rows(5)]},
        {"prompt_embeds": [rows(5, 507)], "negative_prompt_embeds": None, "echoshot": False},
        {"prompt_embeds": rows(5, 507)[None]},
        {"prompt_embeds": rows(5)},
        [[rows(5, 507)[None], {"pooled_output": None}]],
        [(rows(5, 507)[None], {})],
    ],
    ids=["list", "padded list", "batch", "matrix", "conditioning", "conditioning tuple"],
)
def test_every_form_of_embedding_is_read(value: Any) -> None:
    found = embeds.prompt_of(value, "text_embeds")
    assert torch.equal(found.tokens, rows(5))
    assert found.notes == ()


def test_an_embedding_of_nothing_keeps_one_row() -> None:
    assert embeds.prompt_of([[torch.zeros(1, 512, 8), {}]], "text_embeds").tokens.shape == (1, 8)


def test_long_embedding_is_cut_and_the_user_told() -> None:
    found = embeds.prompt_of([[rows(600)[None], {}]], "text_embeds")
    assert found.tokens.shape == (512, 8)
    assert found.notes == ("text_embeds has 600 tokens; it was cut to 512, which is what the model takes",)


def test_more_than_one_conditioning_entry_is_said() -> None:
    found = embeds.prompt_of([[rows(3)[None], {}], [rows(4)[None], {}]], "text_embeds")
    assert len(found.tokens) == 3
    assert found.notes == ("text_embeds has 2 conditioning entries; the first one is used",)


def test_tokens_lie_together() -> None:
    tokens = torch.rand(8, 5).mT
    found = embeds.prompt_of([[tokens[None], {}]], "text_embeds").tokens
    assert found.is_contiguous() and torch.equal(found, tokens)


def test_what_asks_for_another_video_is_named_in_order() -> None:
    extras = {"hooks": 1, "area": (1, 1, 0, 0), "strength": 0.5, "guidance": 1.0, "clip_end_percent": 1.0}
    with pytest.raises(ValueError, match="text_embeds carries area, hooks, strength, which this node does not support"):
        embeds.prompt_of([[rows(3)[None], extras]], "text_embeds")


@pytest.mark.parametrize(
    "key",
    [
        "area", "mask", "mask_strength", "set_area_to_bounds", "control", "control_apply_to_uncond", "hooks", "gligen",
        "reference_motion", "reference_audio_embeds", "control_video", "model_conds", "audio_embed",
        "audio_embed_scale", "time_dim_concat", "unclip_conditioning", "track_path", "lora_strengths",
        "timestep_start", "timestep_end", "noise_mask",
    ],
)  # fmt: skip
def test_what_asks_for_another_video_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"text_embeds carries {key}, which this node does not support"):
        embeds.prompt_of([[rows(3)[None], {key: 1}]], "text_embeds")


def test_what_has_no_effect_is_said() -> None:
    extras = {"pooled_output": rows(1), "guidance": 3.5, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    found = embeds.prompt_of([[rows(3)[None], extras]], "text_embeds")
    assert found.notes == ("text_embeds carries guidance, which has no effect here",)
    of_other_packs = {"nag_scale": 11.0, "token_type": "umt5", "my_pack/info": {}, "x" * 500: 1, "empty": None}
    (note,) = embeds.prompt_of([[rows(3)[None], of_other_packs]], "text_embeds").notes
    assert note.startswith("text_embeds carries my_pack/info, nag_scale, token_type, 'xxx")
    assert "which has no effect here" in note and len(note) < 400


def test_what_text_encode_notes_reaches_the_status() -> None:
    value = {"prompt_embeds": [rows(3)], embeds.NOTES: ["positive_prompt has 600 tokens; it was cut to 512", 7]}
    assert embeds.prompt_of(value, "text_embeds").notes == (
        "text_embeds: positive_prompt has 600 tokens; it was cut to 512",
        "text_embeds: 7",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt_embeds": [rows(3), rows(4)]}, 'holds 2 prompts; this node takes one. A "|"'),
        ({"prompt_embeds": []}, "holds 0 prompts"),
        ({"negative_prompt_embeds": [rows(3)]}, "holds no prompt embedding"),
        ({"prompt_embeds": [torch.ones(3)]}, r"has the shape \[3\]"),
        ([], "it must be WANVIDEOTEXTEMBEDS or CONDITIONING"),
        ("a prompt", "text_embeds is str"),
    ],
)
def test_what_is_no_prompt_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embeds.prompt_of(value, "text_embeds")


def test_negative_comes_from_the_wrapper_dict_only() -> None:
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    found = embeds.negative_of(both, "text_embeds")
    assert found is not None and len(found.tokens) == 4
    assert embeds.negative_of({"prompt_embeds": [rows(3)]}, "text_embeds") is None
    assert embeds.negative_of([[rows(3)[None], {}]], "text_embeds") is None
