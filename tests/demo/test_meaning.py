"""What the trained demo model paints, seen in mp4s. `python demo/meaning demo/model` measures all of its captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh_jobs import run_fresh
from mount import ROOT
from wan_pack.demo.meaning import same_on_ranks as same_on_ranks_module
from wan_pack.demo.meaning.arithmetic import attention_of_codes, eight_bits
from wan_pack.demo.meaning.clips import read_gif
from wan_pack.demo.meaning.measure import agreement, measure, psnr
from wan_pack.demo.meaning.pipeline import FOUR_STEPS, I2V, T2V, Pipeline, as_video, bounded, guided
from wan_pack.demo.meaning.same_on_ranks import same_on_ranks
from wan_pack.demo.meaning.verdict import KEPT, SAME
from wan_pack.demo.show import CAPTION, TRAINED
from wan_pack.demo.train.captions import held_out_scenes, plain_caption
from wan_pack.demo.train.distill import FILES
from wan_pack.demo.train.dit import T2V as T2V_TASK
from wan_pack.demo.train.i2v import I2V as I2V_TASK
from wan_pack.demo.train.loop import generator
from wan_pack.demo.train.trained_files import MAX_ALL, MAX_FILE, trained
from wan_pack.demo.train.world import render
from wan_pack.distributed.job.job import Job
from wan_pack.distributed.launch.result import Result, checked_result
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.codes import quantise_heads

pytestmark = pytest.mark.processes

SCENES = held_out_scenes(8)
SHORT = replace(T2V, steps=4, frames=5)
"""Enough to see that a setting acts."""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(TRAINED, T2V_TASK.files)


@pytest.mark.parametrize("index", [0, 2, 5])
def test_a_clip_shows_what_its_caption_says(pipeline: Pipeline, index: int):
    clip = pipeline.clip(plain_caption(SCENES[index]), T2V, seed=index)
    assert agreement(SCENES[index], measure(as_video(clip)))["all"], measure(as_video(clip))


def test_four_steps_are_enough_with_the_lora_and_not_without(pipeline: Pipeline):
    caption = plain_caption(SCENES[0])
    fast = Pipeline(TRAINED, T2V_TASK.files, FILES).clip(caption, FOUR_STEPS, seed=0)
    assert agreement(SCENES[0], measure(as_video(fast)))["all"]
    slow = pipeline.clip(caption, T2V, seed=0)
    assert psnr(fast, slow) > psnr(pipeline.clip(caption, FOUR_STEPS, seed=0), slow), "the LoRA goes the teacher's way"


def test_a_given_picture_is_the_first_frame():
    scene = SCENES[1]
    picture = render([scene])[0, :, 0]
    settings = replace(I2V, steps=8)
    clip = Pipeline(TRAINED, I2V_TASK.files).clip(plain_caption(scene), settings, seed=1, picture=picture)
    assert psnr(as_video(clip)[:, 0], picture) > KEPT
    assert measure(clip).things[0].motion == scene.things[0].kind.motion


def test_every_setting_changes_the_picture(pipeline: Pipeline):
    caption = "a circle moves right on a black background"
    clip = pipeline.clip(caption, SHORT, seed=1)
    torch.testing.assert_close(pipeline.clip(caption, SHORT, seed=1), clip)
    others = {
        "seed": pipeline.clip(caption, SHORT, seed=2),
        "prompt": pipeline.clip(CAPTION, SHORT, seed=1),
        "negative prompt": pipeline.clip(caption, SHORT, seed=1, negative="a red circle"),
        "guidance": pipeline.clip(caption, guided(SHORT, 1.0), seed=1),
        "boundary": pipeline.clip(caption, bounded(SHORT, 0.0), seed=1),
    }
    assert {name: (other - clip).abs().mean().item() for name, other in others.items() if psnr(other, clip) > 40} == {}


def test_jobs_on_one_and_two_ranks_make_the_same_video(monkeypatch: pytest.MonkeyPatch):
    """On forked ranks: how the launcher starts and follows them is the matter of other tests."""

    def run_forked(job: Job, write_inputs: Callable[[Path], object], *, parent: Path, failed: Path) -> Result:
        parent.mkdir(exist_ok=True)
        folder = run_fresh(job, parent, write_inputs)
        return Result(folder, checked_result(folder, job), "", 0.0)

    monkeypatch.setattr(same_on_ranks_module, "run_job", run_forked)
    assert same_on_ranks(TRAINED, CAPTION, steps=2, ranks=(1, 2))[2] > SAME


def test_the_model_fits_the_repository():
    sizes = {path.name: path.stat().st_size for path in trained(TRAINED)}
    assert len(sizes) == 8
    assert max(sizes.values()) <= MAX_FILE and sum(sizes.values()) <= MAX_ALL


def test_attention_of_codes_is_attention_but_for_what_eight_bits_lose() -> None:
    q, k, v = (torch.randn(37, 3, 16, generator=generator(torch.device("cpu"), i)) * 10 ** (i - 1) for i in range(3))
    exact, rounded = attention(q, k, v), attention_of_codes(q, k, v)
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.06
    # A scale per head: what one head holds does not cost another its bits.
    louder = torch.cat((v[:, :2], 1000 * v[:, 2:]), dim=1)
    torch.testing.assert_close(attention_of_codes(q, k, louder)[:, :2], rounded[:, :2])
    # As codes they come with their own scales.
    by_codes = attention_of_codes(*(quantise_heads(x) for x in (q, k, v)))
    assert by_codes.dtype == torch.bfloat16 and torch.equal(by_codes, rounded.bfloat16())


def test_the_measured_arithmetics_are_a_jobs_own() -> None:
    arithmetics = eight_bits(torch.device("cpu"))
    assert [each.parallel.linear_precision for each in arithmetics.values()] == ["full", "fp8", "fp8"]
    assert all(each.parallel.mixed_precision == "bf16" for each in arithmetics.values())


def test_the_clips_of_the_readme_show_what_they_say():
    """As they are in the file, zoomed and with 128 colours; and the page says how many positions they hold."""
    scenes = {plain_caption(scene): scene for scene in held_out_scenes(100)}
    clips = read_gif(ROOT / "web" / "docs" / "images" / "demo.gif")
    assert len(clips) == 6 and len({scenes[caption].things[0].kind.motion for caption, _ in clips}) == 6
    for caption, clip in clips:
        assert clip.shape == (3, 17, 64, 96)
        assert all(agreement(scenes[caption], measure(clip)).values()), caption
        changes = (clip[:, 1:] - clip[:, :-1]).abs().mean(dim=(0, 2, 3)) > 5e-3
        assert int(changes.sum()) + 1 == 5, caption
    assert "17 frames and five positions" in (ROOT / "README.md").read_text()
