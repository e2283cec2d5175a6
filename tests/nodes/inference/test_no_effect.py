"""Inputs that are set and change nothing with the model are said in the status."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from node_inputs import asked_for, model_files, sampling, use_model_folders
from tiny import TINY, TINY_VACE
from wan_pack.distributed.job.job import ModelFiles
from wan_pack.nodes.inference.no_effect import without_effect
from wan_pack.wan.model.config import WanConfig


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model_folders(tmp_path, monkeypatch)


def said(
    config: WanConfig,
    model: ModelFiles,
    *,
    carried: bool = False,
    seen: bool = False,
    guided: bool = True,
    **inputs: Any,
) -> list[str]:
    given = {"guidance_low": 3.0, "guidance_high": 4.0, "boundary": 0.875, **inputs}
    asked = asked_for(model=model, **given)
    sampled = sampling(**{name: given[name] for name in ("guidance_low", "guidance_high", "boundary")})
    return list(without_effect(asked, model, config, sampled, carried=carried, seen=seen, guided=guided))


@pytest.fixture
def both(tmp_path: Path) -> ModelFiles:
    return model_files(tmp_path)


@pytest.fixture(params=["high_noise", "low_noise"])
def one(both: ModelFiles, request: pytest.FixtureRequest) -> tuple[ModelFiles, str]:
    """A model of one transformer, and where it was chosen."""
    other = {"high_noise": "low_noise", "low_noise": "high_noise"}[request.param]
    return ModelFiles(vae=both.vae, **{request.param: both.high_noise, other: ()}), request.param


def test_what_has_its_default_needs_no_word(both: ModelFiles, one: tuple[ModelFiles, str]) -> None:
    assert said(TINY, both) == said(TINY_VACE, both) == said(TINY, one[0]) == []
    assert said(TINY, both, boundary=0.5, guidance_low=7.0, negative_prompt="grey") == []


def test_the_strength_of_a_control_that_is_not_followed(both: ModelFiles) -> None:
    assert said(TINY, both, vace_strength=0.5) == [
        "vace_strength is 0.5, which has no effect: this model (T2V) follows no control"
    ]
    assert said(TINY_VACE, both, vace_strength=0.5) == []
    (line,) = said(TINY_VACE, both, vace_strength=0.5, carried=True)
    assert line == "vace_strength is 0.5, which has no effect: each control of text_embeds or image_embeds has its own"


def test_clip_that_does_not_look(both: ModelFiles) -> None:
    clip = replace(both, clip_vision=both.vae)
    branch = replace(TINY, in_dim=36, parts=frozenset({"img_emb"}))
    assert said(TINY, clip) == ["clip_vision has no effect: this model (T2V) has no image branch"]
    assert said(branch, clip) == said(branch, both, seen=True) == []
    (line,) = said(branch, clip, seen=True)
    assert line == "clip_vision of Load Wan Video Model has no effect: what CLIP sees is given"


def test_what_two_experts_share(one: tuple[ModelFiles, str]) -> None:
    model, where = one
    used, unused = ("high", "low") if where == "high_noise" else ("low", "high")
    changed = {"boundary": 0.5, "guidance_low": 7.0, "guidance_high": 8.0}
    value = changed[f"guidance_{unused}"]
    assert said(TINY, model, **changed) == [
        "boundary is 0.5, which has no effect: the model is one transformer",
        f"guidance_{unused} is {value:g}, which has no effect: guidance_{used} is that of the one transformer",
    ]
    assert said(TINY, model, guidance_low=7.0, guidance_high=7.0) == []
    assert said(TINY, model, **changed, preset="Lightning 4 steps") == []


@pytest.mark.parametrize(
    "inputs", [{"negative_prompt": "grey"}, {"negative_embeds": object(), "text_embeds": object()}]
)
def test_a_negative_prompt_without_guidance(both: ModelFiles, inputs: dict[str, Any]) -> None:
    assert said(TINY, both, **inputs) == []
    name = next(iter(inputs))
    assert said(TINY, both, guided=False, **inputs) == [f"{name} has no effect: guidance is 1"]


def test_a_negative_prompt_beside_embeds_is_said_elsewhere(both: ModelFiles) -> None:
    assert said(TINY, both, guided=False, negative_prompt="grey", text_embeds=object()) == []
    assert said(TINY, both, guided=False, negative_prompt=" \n") == []
