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


def test_animates_jobs_bring_a_pose_and_a_face_of_each_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from real_jobs import Shape, make_inputs

    inputs = make_inputs(Shape("tiny-animate", "96x64x9"), meta=True)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == {
        # One latent frame more is the picture's.
        "samples": (16, 4, 8, 12), "image_conditioning": (20, 4, 8, 12), "pose_video_latent": (16, 3, 8, 12),
        "face_video_pixels": (3, 9, 512, 512), "clip_features": (257, 1280), "context": (64, 64),
    }  # fmt: skip
