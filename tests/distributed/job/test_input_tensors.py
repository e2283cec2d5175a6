"""Which tensors a model takes, and of which shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from jobs import stub_job
from tiny import TINY
from wan_pack.distributed.job.input_tensors import check_inputs

TEXT = {"context": (7, TINY.text_dim)}
I2V = dataclasses.replace(TINY, in_dim=36)
LATENTS = (16, 2, 6, 8)


def check(config: Any, settings: dict[str, Any] | None = None, **shapes: Any) -> None:
    """Of a job of 64x48 pixels and 5 frames."""
    check_inputs(stub_job(**(settings or {})), config, {**TEXT, **shapes})


@pytest.mark.parametrize("rows", [1, 512])
def test_rows_of_text(rows: int):
    check(TINY, context=(rows, TINY.text_dim), context_null=(rows, TINY.text_dim))


@pytest.mark.parametrize("shape", [(0, TINY.text_dim), (513, TINY.text_dim), (7, TINY.text_dim + 1), (7,), (1, 7, 64)])
@pytest.mark.parametrize(("name", "words"), [("context", "text_embeds"), ("context_null", "negative_embeds")])
def test_other_text_is_refused(name: str, words: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=f"{words} has shape"):
        check(TINY, **{name: shape})


def test_a_job_needs_text():
    with pytest.raises(ValueError, match="neither a prompt to encode nor embeddings"):
        check_inputs(stub_job(), TINY, {})


def test_pictures_are_of_the_videos_size():
    check(I2V, start_image=(3, 48, 64))
    for shape in ((3, 64, 48), (1, 48, 64), (3, 48, 65)):
        with pytest.raises(ValueError, match="start_image has shape"):
            check(I2V, start_image=shape)
    with pytest.raises(ValueError, match="start_image is given, but the model makes videos from text only"):
        check(TINY, start_image=(3, 48, 64))
    with pytest.raises(ValueError, match="makes videos from an image"):
        check(I2V)


def test_latents_to_start_from_are_of_the_videos_shape():
    check(TINY, samples=LATENTS)
    for shape in ((16, 1, 6, 8), (16, 2, 8, 6), (48, 2, 6, 8)):
        with pytest.raises(ValueError, match="samples has shape"):
            check(TINY, samples=shape)
    for settings, words in (
        ({"strength": 0.5}, r"strength is 0\.5"), ({"start_step": 1}, "start_step is 1"),
        ({"add_noise": False}, "add_noise is False"),
    ):  # fmt: skip
        check(TINY, settings, samples=LATENTS)
        with pytest.raises(ValueError, match=f"{words}, but no latents"):
            check(TINY, settings)
