"""Weights that benchmarks make up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mount import ROOT
from wan_pack.wan.transformer.transformer import meta_model


def test_norms_let_through_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose names do not say so, as of the image branch: behind zeros a model computes with zeros."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_models

    config = dataclasses.replace(random_models.model_config("tiny-i2v"), parts=frozenset({"img_emb"}), clip_dim=16)
    numbers = random_models.bank()
    for name, parameter in meta_model(config, torch.bfloat16).named_parameters():
        if parameter.ndim == 1:
            values = torch.full(parameter.shape, torch.nan)
            random_models.fill_transformer(name, values, numbers)
            assert values.eq(float(name.endswith("weight"))).all(), name
