"""That a kind of what a model is told is a row, and which files know a variant by name."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from mount import ROOT
from tiny import TINY_ANIMATE
from wan_pack.wan.model.latent_space import WAN21
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.sampling.told import KINDS, Kind
from wan_pack.wan.transformer.conditions import Beside, made

LATENTS = (3, 6, 8)
WORDS = {"Animate": {"animate", "animates", "face", "faces", "blur"}, "VACE": {"vace"}}
"""Variant -> words of which its code has some. That a pose may be a control is another matter."""


def test_every_row_is_a_field_of_what_the_model_reads():
    assert [field.name for field in fields(Beside)] == list(KINDS)
    for names in ("cond", "entry", "tensors"):
        given = [getattr(kind, names) for kind in KINDS.values() if getattr(kind, names)]
        assert len(set(given)) == len(given), names


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_row_is_of_the_models_that_have_its_part(kind: Kind):
    reads = {variant.name for variant in VARIANTS.values() if kind.part in variant.parts}
    assert reads
    for name in kind.tensors:
        assert {variant.name for variant in VARIANTS.values() if name in variant.takes} == reads
    shape = (9, 4) if kind.size is None else (2, *kind.size(LATENTS, WAN21.stride))
    assert made(kind.name, torch.zeros(shape), LATENTS, WAN21.stride).for_expert(keep=True) is not None


def test_sizes_follow_from_the_latents():
    for name, expected in (
        ("controls", (3, 6, 8)), ("reference", (1, 6, 8)), ("camera", (3, 48, 64)), ("pose", (2, 6, 8)),
        ("face", (5, 512, 512)),
    ):  # fmt: skip
        kind = KINDS[name]
        assert kind.fits((7, *expected), LATENTS, WAN21.stride)
        assert kind.fits((7, expected[0] - 1, *expected[1:]), LATENTS, WAN21.stride) == kind.fewer, name
        for wrong in ((7, expected[0] + 1, *expected[1:]), (7, *expected[:2], 9), (7, 0, *expected[1:]), expected):
            assert not kind.fits(wrong, LATENTS, WAN21.stride), (name, wrong)
    assert KINDS["face"].shape(TINY_ANIMATE, LATENTS) == (3, 5, 512, 512)
    # A single latent frame is who is shown.
    assert not KINDS["pose"].fits((16, 1, 6, 8), (1, 6, 8), WAN21.stride)


def test_kinds_are_said_by_what_they_count():
    config = replace(TINY_ANIMATE, camera_dim=24 * 64, control_dim=96, reference_dim=16)
    found = {
        name: (kind.channels(config), kind.axes, kind.of_several_sizes, kind.most, kind.in_front)
        for name, kind in KINDS.items()
    }
    assert found == {
        "picture": (64, "latent frames, rows, columns", False, 1, 0),
        "controls": (96, "latent frames, rows, columns", False, 16, 0),
        "reference": (16, "latent frames, rows, columns", True, 1, 1),
        "camera": (24, "latent frames, height, width", False, 1, 0),
        "pose": (16, "latent frames, rows, columns", True, 1, 0),
        "face": (3, "frames, 512, 512", True, 1, 0),
    }
    picture = KINDS["picture"]
    assert [picture.fits(shape, LATENTS, 8) for shape in ((257, 64), (1, 257, 64), (64,))] == [True, False, False]
    assert not KINDS["face"].fits((3, 5, 512), LATENTS, 8)
    assert [bool(kind.needed) for kind in KINDS.values()] == [True, True, False, False, False, False]


@functools.cache
def words_of(path: Path) -> set[str]:
    """Of names and texts, not of docstrings and comments."""
    tree = ast.parse(path.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: set[str] = set()
    for node in ast.walk(tree):
        texts = [getattr(node, part, None) for part in ("id", "attr", "name", "arg", "module")]
        texts += [node.value] if isinstance(node, ast.Constant) and id(node) not in told else []
        for text in texts:
            found |= set(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)) if isinstance(text, str) else set()
    return {word.lower() for word in found}


@pytest.mark.parametrize("variant", WORDS)
def test_the_places_of_a_variant_are_those_that_are_listed(variant: str):
    listed = (ROOT / "CONTRIBUTING.md").read_text().split("## A variant's places")[1].split("\n## ")[0]
    (table,) = (part for part in re.split(r"\n(?=Animate, |VACE )", listed) if part.startswith(variant))
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    places = {place for row in rows for place in re.findall(r"`([^`]+)`", row)}
    files = [path for room in ("wan", "distributed", "nodes") for path in (ROOT / room).rglob("*.py")]
    knowing = {path.relative_to(ROOT).as_posix() for path in files if words_of(path) & WORDS[variant]}
    assert knowing == places
