"""What a clip shows, by classical image analysis: background, and of each thing colour, shape, motion and place.

Nothing is told about what to expect. Shapes are known by their rotational symmetry: the angular moments

    c_n = sum(w r^4 exp(i n angle)) / sum(w r^4)         around the thing's centre, w its coverage of a pixel

are large for n = 3 of a triangle, 4 of a square, 5 of a star and for none of a circle; their phase is the angle.
Shapes: F = frames, H, W = pixels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..train.world import BACKGROUNDS, COLOURS, HORIZONTAL, SHAPES, VERTICAL, WIDTH, Kind, Scene, Thing, render

SYMMETRIES = (3, 4, 5)
SMALLEST = 20.0
"""Pixels that a thing covers."""
CORE = 8.0
"""Pixels per frame, away from edges, that make a colour a thing's: edges mix colours."""
FAR = 24.0
"""Columns, between the first and the last frame, of a motion to the left or right."""
HIGH = 14.0
"""Rows, of a motion up or down."""
BOUNCE = 10.0
"""Rows, halfway against both ends."""
GROWTH = 1.8
"""Of the covered area."""
TURNED = math.radians(60)
OFF_LINE = 60.0
"""Of 255: how far a pixel's colour may be from a mixture of thing and background."""


@dataclass(frozen=True, slots=True)
class Seen:
    colour: str
    shape: str
    motion: str
    """One of `world.MOTIONS`, or "stays"."""
    place: str
    """The third of the picture that its centre is in, on average: left, middle, right."""


@dataclass(frozen=True, slots=True)
class Measured:
    background: str
    things: tuple[Seen, ...]
    """The one that covers most first."""


def measure(clip: Tensor) -> Measured:
    """clip: [3, F, H, W] in [-1, 1]."""
    pixels = ((clip.float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)  # [F, H, W, 3]
    names = list(COLOURS | BACKGROUNDS)
    palette = torch.tensor(list((COLOURS | BACKGROUNDS).values()), dtype=torch.float32)
    labels = torch.cdist(pixels.reshape(-1, 3), palette).argmin(1).view(pixels.shape[:3])
    background = max(BACKGROUNDS, key=lambda name: int((labels == names.index(name)).sum()))
    ground = pixels[labels == names.index(background)]
    ground = ground.median(0).values if len(ground) else torch.tensor(BACKGROUNDS[background]).float()
    cores = {}
    for name in COLOURS:
        # A pixel whose neighbours all have its colour.
        same = -F.max_pool2d(-(labels == names.index(name)).float()[:, None], 3, 1, 1)[:, 0]
        if name != background and same.sum() >= CORE * len(labels):
            cores[name] = same > 0
    most = max((int(core.sum()) for core in cores.values()), default=0)
    colours = {name: pixels[core].median(0).values for name, core in cores.items() if core.sum() >= 0.2 * most}
    coverage = _coverage(pixels, ground, list(colours.values()))
    seen = [(float(w.sum()), _thing(name, w)) for name, w in zip(colours, coverage, strict=True)]
    return Measured(background, tuple(thing for _, thing in sorted(seen, key=lambda pair: -pair[0]) if thing))


def _coverage(pixels: Tensor, ground: Tensor, colours: list[Tensor]) -> list[Tensor]:
    """For each colour [F, H, W]: how much of each pixel it covers, if the rest is background."""
    weights, errors = [], []
    for colour in colours:
        line = colour - ground
        along = ((pixels - ground) @ line / line.square().sum()).clamp(0, 1)
        errors.append((pixels - ground - along[..., None] * line).norm(dim=-1))
        weights.append(along)
    if not colours:
        return []
    nearest = torch.stack(errors).argmin(0)
    return [
        weight * (weight > 0.3) * (error < OFF_LINE) * (nearest == i)
        for i, (weight, error) in enumerate(zip(weights, errors, strict=True))
    ]


def _thing(colour: str, weights: Tensor) -> Seen | None:
    """weights: [F, H, W]; None if it is in too few frames to be followed."""
    weights = weights[weights.sum((1, 2)) > SMALLEST]
    if len(weights) < 5:
        return None
    x, y, area, moments = _follow(weights)
    sizes = moments.abs().mean(0)
    shape = min(SHAPES, key=lambda name: float((sizes - _prototypes()[name]).norm()))
    place = ("left", "middle", "right")[min(int(x.mean() / (WIDTH / 3)), 2)]
    return Seen(colour, shape, _motion(x, y, area, moments, shape), place)


def _follow(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[F, H, W] -> centre's column and row and the area, each [F], and the moments [F, 3]."""
    rows = torch.arange(weights.shape[1])[:, None] + 0.5
    cols = torch.arange(weights.shape[2])[None, :] + 0.5
    area = weights.sum((1, 2))
    x, y = ((weights * axis).sum((1, 2)) / area for axis in (cols, rows))
    u, v = cols - x[:, None, None], rows - y[:, None, None]
    far = weights * (u.square() + v.square()).square()
    angle = torch.atan2(u, -v)
    moments = [(far * torch.polar(torch.ones_like(angle), n * angle)).sum((1, 2)) for n in SYMMETRIES]
    return x, y, area, torch.stack(moments, 1) / far.sum((1, 2))[:, None]


def _motion(x: Tensor, y: Tensor, area: Tensor, moments: Tensor, shape: str) -> str:
    across, down = (float(at[-2:].mean() - at[:2].mean()) for at in (x, y))
    if abs(across) > FAR and abs(across) > abs(down):
        return "right" if across > 0 else "left"
    if abs(down) > HIGH:
        return "down" if down > 0 else "up"
    middle = len(y) // 2
    if float(y[middle - 1 : middle + 2].mean() - (y[:2].mean() + y[-2:].mean()) / 2) > BOUNCE:
        return "bounces"
    growth = float(area[-2:].mean() / area[:2].mean())
    if max(growth, 1 / growth) > GROWTH:
        return "grows" if growth > 1 else "shrinks"
    if shape == "circle":
        return "stays"
    order = {"triangle": 3, "square": 4, "star": 5}[shape]
    phases = moments[:, SYMMETRIES.index(order)]
    steps = (phases[1:] * phases[:-1].conj()).angle() / order
    return "spins" if abs(float(steps.sum())) > TURNED else "stays"


@functools.cache
def _prototypes() -> dict[str, Tensor]:
    """Sizes of the moments [3] of each shape as the world draws it."""
    found = {}
    for shape in SHAPES:
        thing = Thing(Kind("white", shape, "right"), "big", "", (12.0, 12.0), (40.0, 32.0), (56.0, 32.0))
        clip = render([Scene((thing,), "black")])[0]
        found[shape] = _follow((clip.mean(0) + 1) / 2 * (clip.mean(0) > -0.5))[3].abs().mean(0)
    return found


def direction(motion: str) -> str:
    """Where a motion leads: left, right, up or down, or nowhere, as spinning, growing and bouncing do."""
    return motion if motion in (*HORIZONTAL, *VERTICAL) else ""


def agreement(scene: Scene, measured: Measured) -> dict[str, bool]:
    """What of `scene` a clip shows; every aspect must hold for all its things, and no other thing may be there."""
    by_colour = {seen.colour: seen for seen in measured.things}
    pairs = [(thing, by_colour.get(thing.kind.colour)) for thing in scene.things]
    if len(scene.things) == 1 and measured.things:
        # In another colour it may still have the right shape and motion.
        pairs = [(scene.things[0], measured.things[0])]

    def everywhere(aspect: str) -> bool:
        return all(seen is not None and getattr(seen, aspect) == getattr(thing.kind, aspect) for thing, seen in pairs)

    found = {aspect: everywhere(aspect) for aspect in ("colour", "shape", "motion")}
    found["direction"] = all(
        seen is not None and direction(seen.motion) == direction(thing.kind.motion) for thing, seen in pairs
    )
    found["place"] = all(seen is not None and thing.place in ("", seen.place) for thing, seen in pairs)
    found["background"] = measured.background == scene.background
    found["number"] = len(measured.things) == len(scene.things)
    found["all"] = all(found.values())
    return found


def psnr(clip: Tensor, reference: Tensor) -> float:
    """Decibels, of values in [-1, 1]."""
    error = float((clip - reference).square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)
