"""WanVideo TextEncode: what it cuts is said in the status of the job that its embeddings go to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jobs import tiny_job
from wan_pack.nodes.host import host
from wan_pack.nodes.sockets import embeds
from wan_pack.nodes.text import TextEncoderFiles, WanVideoTextEncode

LONG = "a red fox walks through deep snow " * 150


def test_a_long_prompt_is_cut_and_said(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "free_memory", lambda: None)
    monkeypatch.setattr(host, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(host, "interrupted", lambda: False)
    encoder = Path(tiny_job(tiny_models).model.text_encoder[0].path)
    files = TextEncoderFiles((encoder,), (), "fp32")
    (made,) = WanVideoTextEncode().encode(LONG, "ugly", files)
    found = embeds.prompt_of(made, "text_embeds")
    assert len(found.tokens) == 512
    (note,) = found.notes
    assert note.startswith("text_embeds: positive_prompt has ")
    assert note.endswith(" tokens; it was cut to 512, which is what the model takes")
    (short,) = WanVideoTextEncode().encode("a fox", LONG, files)
    (note,) = embeds.prompt_of(short, "text_embeds").notes
    assert note.startswith("text_embeds: negative_prompt has ")
