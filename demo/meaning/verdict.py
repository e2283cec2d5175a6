"""Measures the trained model: does a clip show what its caption says, and do the settings act as they should?

Every clip is measured as a player shows it: written to an mp4 by the pack's own writer, and read back.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..train.captions import held_out_scenes, plain_caption
from ..train.distill import FILES
from ..train.dit import T2V as T2V_TASK
from ..train.i2v import I2V as I2V_TASK
from ..train.trained_files import NAMES, place
from ..train.world import Scene, render
from .arithmetic import eight_bits
from .measure import agreement, measure, psnr
from .pipeline import FOUR_STEPS, I2V, T2V, Pipeline, Settings, as_video, bounded, guided
from .same_on_ranks import same_on_ranks

ASPECTS = ("colour", "shape", "place", "direction", "motion", "background", "number", "all")
MUST = ("colour", "shape", "place", "direction")
"""What most clips must show. A motion that leads nowhere, such as spinning, has its own column."""
KEPT = 24.0
"""Decibels of an I2V clip's first frame against the given picture; another scene's has about 10."""
SAME = 50.0
"""Decibels of the same video on different numbers of ranks."""
ANOTHER = 0.02
"""Mean difference of two clips, of 2, from which on they are different ones."""
AVOIDED = 0.7
"""Share of clips that leave out what the negative prompt names."""
SUBJECT = "a {}circle moves right on a black background"

Make = Callable[[Scene, int], Tensor]


def main(arguments: list[str] | None = None) -> int:
    """Prints what clips of held-out captions show, and judges what the settings do. Status 1 if anything fails."""
    parser = argparse.ArgumentParser(prog="python demo/meaning", description=main.__doc__)
    parser.add_argument("models", type=Path, help="ComfyUI's models folder with the trained files")
    parser.add_argument(
        "--captions", type=int, default=100, help="of kinds that no training clip showed, all different"
    )
    parser.add_argument("--few", type=int, default=20, help="captions for each of the other settings")
    parser.add_argument("--steps", type=int, default=T2V.steps)
    parser.add_argument(
        "--at-least", type=float, default=0.9, help="share of clips, 0 to 1, that must show what is in MUST"
    )
    parser.add_argument("--at-least-fast", type=float, default=0.8, help="the same, for four steps with the LoRA")
    parser.add_argument("--no-ranks", action="store_true", help="start no processes")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scenes = held_out_scenes(options.captions)
    table = _Table(scenes, options.few)
    settings, image_settings = (replace(each, steps=options.steps) for each in (T2V, I2V))
    plain = Pipeline(options.models, T2V_TASK.files, device=device)

    def clips(pipeline: Pipeline, settings_: Settings) -> Make:
        return lambda scene, seed: pipeline.clip(plain_caption(scene), settings_, seed=seed)

    table.row("drawn clips", lambda scene, seed: render([scene])[0])
    shown, most = table.row(f"{settings.steps} steps", clips(plain, settings))
    _, unguided = table.row("guidance 1", clips(plain, guided(settings, 1.0)), few=True)
    _, high = table.row("high-noise expert alone", clips(plain, bounded(settings, 0.0)), few=True)
    _, low = table.row("low-noise expert alone", clips(plain, bounded(settings, 1.0)), few=True)
    verdicts = [
        _shown(shown, options.at_least),
        _verdict("guidance helps", most > unguided or unguided == 1, f"{most:.0%} against {unguided:.0%}"),
        _verdict("both experts are needed", most > max(high, low), f"{most:.0%} against {high:.0%} and {low:.0%}"),
        _seeds(plain, settings),
        _negative_prompt(plain, settings, options.few),
    ]
    if place(options.models, NAMES.high_noise_lora).is_file():
        fast = Pipeline(options.models, T2V_TASK.files, FILES, device=device)
        shown, with_lora = table.row("4 steps with LoRA", clips(fast, FOUR_STEPS))
        verdicts.append(_shown(shown, options.at_least_fast))
        _, without = table.row("4 steps without LoRA", clips(plain, FOUR_STEPS), few=True)
        verdicts.append(_verdict("the LoRA helps", with_lora > without, f"{with_lora:.0%} against {without:.0%}"))
    if place(options.models, NAMES.i2v_high_noise).is_file():
        verdicts.append(_image_to_video(table, Pipeline(options.models, I2V_TASK.files, device=device), image_settings))
    for name, arithmetic in eight_bits(torch.device(device)).items():
        # No verdict: what is lossy may lose.
        pipeline = Pipeline(options.models, T2V_TASK.files, device=device, arithmetic=arithmetic)
        table.row(name, clips(pipeline, settings), few=True)
    same = {} if options.no_ranks else same_on_ranks(options.models, plain_caption(scenes[0]), steps=settings.steps)
    if same:
        words = ", ".join(f"{count} ranks {value:.0f} dB" for count, value in same.items())
        verdicts.append(_verdict("the same video on every number of ranks", min(same.values()) >= SAME, words))
    return int(not all(verdicts))


class _Table:
    """A line per setting: how many of the clips show what."""

    def __init__(self, scenes: Sequence[Scene], few: int) -> None:
        self._scenes, self._few = scenes, few
        print(f"{'':34}{'clips':>6}" + "".join(f"{aspect:>11}" for aspect in ASPECTS))

    def row(self, name: str, make: Make, *, few: bool = False) -> tuple[dict[str, float], float]:
        """Prints it. Returns the share that shows each aspect, and the share of the first few that show all."""
        scenes = self._scenes[: self._few] if few else self._scenes
        found = [agreement(scene, measure(as_video(make(scene, seed)))) for seed, scene in enumerate(scenes)]
        shares = {aspect: sum(each[aspect] for each in found) / len(found) for aspect in ASPECTS}
        print(f"{name:34}{len(found):6}" + "".join(f"{share:11.0%}" for share in shares.values()), flush=True)
        missed = Counter(s.things[0].kind.motion for s, each in zip(scenes, found, strict=True) if not each["motion"])
        if missed and not few:
            asked = Counter(scene.things[0].kind.motion for scene in scenes)
            print("    motions not shown: " + ", ".join(f"{m} {count} of {asked[m]}" for m, count in missed.items()))
        first = found[: self._few]
        return shares, sum(each["all"] for each in first) / len(first)


def _shown(shares: dict[str, float], least: float) -> bool:
    words = ", ".join(f"{aspect} {shares[aspect]:.0%}" for aspect in MUST)
    return _verdict("captions are shown", min(shares[a] for a in MUST) >= least, f"{words}, wanted {least:.0%}")


def _verdict(name: str, passed: bool, words: str) -> bool:
    print(f"{'pass' if passed else 'FAIL'}: {name}: {words}", flush=True)
    return passed


def _seeds(pipeline: Pipeline, settings: Settings) -> bool:
    first, again, other = (pipeline.clip(SUBJECT.format(""), settings, seed=seed) for seed in (1, 1, 2))
    same, different = (float((clip - first).abs().mean()) for clip in (again, other))
    words = f"the same seed differs by {same:.4f}, another by {different:.4f}"
    return _verdict("a seed is a clip", same < 1e-3 and different > ANOTHER, words)


def _negative_prompt(pipeline: Pipeline, settings: Settings, count: int) -> bool:
    """A caption without a colour: the colour that a seed gives is named in the negative prompt, and should go."""
    named = gone = 0
    for seed in range(count):
        shown = _colours(pipeline.clip(SUBJECT.format(""), settings, seed=seed))
        if not shown:
            continue
        colour = shown[0]
        negative = SUBJECT.format(f"{colour} ")
        named += 1
        gone += colour not in _colours(pipeline.clip(SUBJECT.format(""), settings, seed=seed, negative=negative))
    words = f"gone in {gone} of {named} clips that showed it"
    return _verdict("a colour in the negative prompt goes", named > 0 and gone >= AVOIDED * named, words)


def _colours(clip: Tensor) -> list[str]:
    return [seen.colour for seen in measure(as_video(clip)).things]


def _image_to_video(table: _Table, pipeline: Pipeline, settings: Settings) -> bool:
    values = []

    def make(scene: Scene, seed: int) -> Tensor:
        picture = render([scene])[0, :, 0]
        clip = pipeline.clip(plain_caption(scene), settings, seed=seed, picture=picture)
        values.append(psnr(as_video(clip)[:, 0], picture))
        return clip

    table.row(f"image to video, {settings.steps} steps", make, few=True)
    mean = sum(values) / len(values)
    return _verdict("the given picture is the first frame", mean >= KEPT, f"{mean:.1f} dB, at worst {min(values):.1f}")
