"""The little world that the demo model knows: one or two shapes that move over a plain background. Drawn, not stored.

Shapes: B = clips, N = things per clip (2; an absent one has radius 0), F = frames, H, W = pixels.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 17, 64, 96
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 230),
    "yellow": (240, 220, 40),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "white": COLOURS["white"],
    "cyan": (90, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "star")
HORIZONTAL, VERTICAL = ("left", "right"), ("up", "down")
PLACED = ("bounces", "spins", "grows", "shrinks")
"""Motions that stay at a place, which the caption names."""
MOTIONS = (*HORIZONTAL, *VERTICAL, *PLACED)
PLACES = {"left": 22.0, "middle": 48.0, "right": 74.0}
"""Column of the centre, pixels."""
RADII = {"small": (9.0, 11.0), "big": (13.5, 15.5)}
"""Of a circle as large as the thing, pixels."""
GROWN = 17.0
SHRUNK = 7.0
HARD, HARD_SHARE = "spins", 0.3
"""A motion that is learned late, and how often a clip of one thing shows it, beyond its turn among all."""
TURN = math.pi
"""What a spinning thing turns in a clip, clockwise."""


class Kind(NamedTuple):
    """What is kept out of training, or not, as a whole."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True, slots=True)
class Thing:
    kind: Kind
    size: str
    """A key of `RADII`; of no meaning for one that grows or shrinks."""
    place: str
    """A key of `PLACES` for the motions of `PLACED`, otherwise empty."""
    radius: tuple[float, float]
    """In the first and in the last frame."""
    start: tuple[float, float]
    """Column and row of the centre in the first frame."""
    end: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


def held_out(kind: Kind) -> bool:
    """Whether no training clip shows it: one kind in ten, by its name's checksum."""
    return zlib.crc32(" ".join(kind).encode()) % 10 == 0


def kinds(*, held: bool, motions: Sequence[str] = MOTIONS) -> list[Kind]:
    """All kinds that are (`held`) or are not held out. A circle that spins cannot be told from one that does not."""
    every = (Kind(c, s, m) for c in COLOURS for s in SHAPES for m in motions if (s, m) != ("circle", "spins"))
    return [kind for kind in every if held_out(kind) == held]


_TRAINED = {motions: kinds(held=False, motions=motions) for motions in (MOTIONS, (HARD,), HORIZONTAL, VERTICAL)}


def draw_scene(rng: random.Random) -> Scene:
    """A scene for training. A quarter have two things, in lanes of their own."""
    if rng.random() < 0.75:
        return scene_of(rng.choice(_TRAINED[(HARD,) if rng.random() < HARD_SHARE else MOTIONS]), rng)
    choices = _TRAINED[rng.choice((HORIZONTAL, VERTICAL))]
    first = rng.choice(choices)
    second = rng.choice([kind for kind in choices if kind.colour != first.colour])
    things = tuple(_thing(kind, rng, lane) for lane, kind in enumerate((first, second)))
    return Scene(things, _background(things, rng))


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """The same scenes for the same seed, on every machine."""
    rng = random.Random(seed)
    return [draw_scene(rng) for _ in range(count)]


def scene_of(kind: Kind, rng: random.Random) -> Scene:
    """A scene of one thing."""
    things = (_thing(kind, rng),)
    return Scene(things, _background(things, rng))


def _background(things: Sequence[Thing], rng: random.Random) -> str:
    return rng.choice([name for name in BACKGROUNDS if all(thing.kind.colour != name for thing in things)])


def _thing(kind: Kind, rng: random.Random, lane: int | None = None) -> Thing:
    size = "small" if lane is not None else rng.choice(tuple(RADII))
    radius = rng.uniform(*RADII[size])
    radii = {"grows": (SHRUNK, GROWN), "shrinks": (GROWN, SHRUNK)}.get(kind.motion, (radius, radius))
    place, low, high = "", 17.0, HEIGHT - 17.0
    if kind.motion in HORIZONTAL:
        row = rng.uniform(24, 40) if lane is None else (17.0, HEIGHT - 17.0)[lane]
        start, end = (20.0, row), (WIDTH - 20.0, row)
    elif kind.motion in VERTICAL:
        column = rng.uniform(24, WIDTH - 24) if lane is None else (26.0, WIDTH - 26.0)[lane]
        start, end = (column, low), (column, high)
    else:
        place = rng.choice(tuple(PLACES))
        column = PLACES[place] + rng.uniform(-2, 2)
        start = end = (column, HEIGHT / 2 + rng.uniform(-2, 2))
        if kind.motion == "bounces":
            start, end = (column, low), (column, high)
    if kind.motion in ("left", "up"):
        start, end = end, start
    return Thing(kind, size, place, radii, start, end)


def render(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Draws clips, with antialiased edges: [B, 3, F, H, W] in [-1, 1], float32."""
    columns = torch.tensor([[_numbers(scene, i) for i in range(2)] for scene in scenes], device=device)
    x0, y0, x1, y1, r0, r1, shape, motion = (part[..., None] for part in columns.unbind(-1))  # [B, N, 1]
    time = torch.linspace(0, 1, FRAMES, device=device)
    # A bounce is at its end halfway through, and back at the end.
    way = torch.where(motion == MOTIONS.index("bounces"), 1 - (math.pi * time).cos().abs(), time)
    angle = torch.where(motion == MOTIONS.index("spins"), TURN * time, 0.0)
    x, y, radius = x0 + (x1 - x0) * way, y0 + (y1 - y0) * way, r0 + (r1 - r0) * way  # [B, N, F]
    rows = torch.arange(HEIGHT, device=device)[:, None] + 0.5
    cols = torch.arange(WIDTH, device=device)[None, :] + 0.5
    image = _rgb([BACKGROUNDS[scene.background] for scene in scenes], device)[:, :, None, None, None]
    image = image.expand(-1, -1, FRAMES, HEIGHT, WIDTH)
    for i in range(2):
        dx, dy = (part[:, i, :, None, None] for part in (x, y))
        turn = angle[:, i, :, None, None]
        u, v = cols - dx, rows - dy
        u, v = turn.cos() * u + turn.sin() * v, turn.cos() * v - turn.sin() * u
        distance = _distance(u, v, radius[:, i, :, None, None], shape[:, i, :, None, None])
        alpha = (0.5 - distance).clamp(0, 1)[:, None]
        colours = [COLOURS[scene.things[min(i, len(scene.things) - 1)].kind.colour] for scene in scenes]
        image = image + alpha * (_rgb(colours, device)[:, :, None, None, None] - image)
    return image


def _numbers(scene: Scene, index: int) -> tuple[float, ...]:
    if index >= len(scene.things):
        # Far outside of the picture.
        return (-1000.0, -1000.0, -1000.0, -1000.0, 1.0, 1.0, 0.0, 0.0)
    thing = scene.things[index]
    indices = float(SHAPES.index(thing.kind.shape)), float(MOTIONS.index(thing.kind.motion))
    return (*thing.start, *thing.end, *thing.radius, *indices)


def _rgb(colours: Sequence[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32, device=device) / 127.5 - 1


def _distance(u: Tensor, v: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Pixels to the outline, negative inside. u, v: right and down of the centre; shape: index into `SHAPES`."""
    circle = torch.hypot(u, v) - radius
    square = torch.maximum(u.abs(), v.abs()) - 0.886 * radius
    outer = 1.3 * radius
    half = 3**0.5 / 2
    triangle = torch.maximum(v, (half * u).abs() - v / 2) - outer / 2
    # A star is ten mirrored copies of the edge from a tip to the notch beside it.
    tenth = math.pi / 5
    polar = torch.atan2(u, -v)
    folded = (torch.remainder(polar + tenth, 2 * tenth) - tenth).abs()
    along, across = torch.hypot(u, v) * folded.cos(), torch.hypot(u, v) * folded.sin()
    notch = 0.5
    edge = (notch * math.sin(tenth), 1 - notch * math.cos(tenth))
    length = math.hypot(*edge)
    star = ((along - outer) * edge[0] + across * edge[1]) / length
    which = shape.long()
    return torch.where(which == 0, circle, torch.where(which == 1, square, torch.where(which == 2, triangle, star)))
