"""What is said of a scene: a small grammar with several ways to say the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .world import Scene, Thing, draw_scene, kinds, scene_of

VERBS: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "moves to the left", "slides to the left", "travels from right to left"),
    "right": ("moves right", "moves to the right", "slides to the right", "travels from left to right"),
    "up": ("moves up", "moves upwards", "rises", "travels from the bottom to the top"),
    "down": ("moves down", "moves downwards", "sinks", "travels from the top to the bottom"),
    "bounces": ("bounces", "falls and bounces back up"),
    "spins": ("spins", "turns around", "rotates"),
    "grows": ("grows", "gets bigger", "becomes larger"),
    "shrinks": ("shrinks", "gets smaller"),
}
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
GROUNDS = ("on a {} background", "over a {} background", "in front of a {} wall", "with a {} background")
UNSAID = 0.1
"""How often a colour, or the background, is left out."""


def plain_caption(scene: Scene) -> str:
    """The one caption that names everything."""
    things = " and ".join(
        f"{_subject(t, t.kind.colour, '')} {_action(t, VERBS[t.kind.motion][0])}" for t in scene.things
    )
    return f"{things} {GROUNDS[0].format(scene.background)}"


def draw_caption(scene: Scene, rng: random.Random) -> str:
    """One of the many."""
    parts = []
    for thing in scene.things:
        colour = "" if rng.random() < UNSAID and len(scene.things) == 1 else thing.kind.colour
        fixed_size = thing.kind.motion in ("grows", "shrinks") or len(scene.things) > 1 or rng.random() < 0.5
        size = "" if fixed_size else rng.choice(SIZES[thing.size])
        parts.append(f"{_subject(thing, colour, size)} {_action(thing, rng.choice(VERBS[thing.kind.motion]))}")
    if len(parts) > 1:
        rng.shuffle(parts)
    text = " and ".join(parts)
    if rng.random() >= UNSAID:
        text += " " + rng.choice(GROUNDS).format(scene.background)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def held_out_scenes(count: int, seed: int = 1) -> list[Scene]:
    """Scenes of kinds that no training clip shows, in turn; no two have the same plain caption.

    Raises:
        ValueError: there are not that many.
    """
    rng = random.Random(seed)
    choices = kinds(held=True)
    rng.shuffle(choices)
    scenes: dict[str, Scene] = {}
    for turn in range(100 * len(choices)):
        if len(scenes) == count:
            return list(scenes.values())
        scene = scene_of(choices[turn % len(choices)], rng)
        scenes.setdefault(plain_caption(scene), scene)
    raise ValueError(f"{count} captions are asked for; held-out kinds have {len(scenes)} different ones")


def _subject(thing: Thing, colour: str, size: str) -> str:
    words = " ".join(word for word in (size, colour, thing.kind.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _action(thing: Thing, verb: str) -> str:
    return f"{verb} {PLACE_WORDS[thing.place]}" if thing.place else verb


def sentences(count: int = 3000, seed: int = 0) -> Iterator[str]:
    """What the tokenizer is made from. Of scenes for training alone, which between them have every word."""
    rng = random.Random(seed)
    for _ in range(count):
        yield draw_caption(draw_scene(rng), rng)
