"""The demo model's world, its captions, the tools that measure clips, and the training around them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wan_pack.demo import show as demo
from wan_pack.demo.example import node_of
from wan_pack.demo.meaning.measure import agreement, measure, psnr
from wan_pack.demo.meaning.pipeline import as_video
from wan_pack.demo.train import small_umt5
from wan_pack.demo.train.batched import BatchedModel, initialise
from wan_pack.demo.train.captions import draw_caption, held_out_scenes, plain_caption, sentences
from wan_pack.demo.train.distill import Update, student
from wan_pack.demo.train.dit import T2V
from wan_pack.demo.train.i2v import IN_DIM, widened
from wan_pack.demo.train.loop import Budget, fit, generator
from wan_pack.demo.train.sizes import FULL, SMOKE
from wan_pack.demo.train.small_vae import Z_DIM, build, decode, emphasis, encode, fold_statistics, training_clips
from wan_pack.demo.train.trained_files import MAX_ALL, MAX_FILE, NAMES, place
from wan_pack.demo.train.world import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    HEIGHT,
    MOTIONS,
    SHAPES,
    WIDTH,
    draw_scenes,
    held_out,
    kinds,
    render,
    scene_of,
)
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.text.tokenizer import Tokenizer
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel
from wan_pack.wan.vae.autoencoder import decode_frames
from wan_pack.wan.vae.autoencoder import encode as encode_clip
from wan_pack.wan.vae.latents import denormalise


def test_no_training_scene_shows_a_kind_that_is_held_out() -> None:
    shown = {thing.kind for scene in draw_scenes(3000, seed=1) for thing in scene.things}
    assert not any(map(held_out, shown))
    assert shown == set(kinds(held=False)), "training shows all the others"
    assert 0.05 < len(kinds(held=True)) / len(shown) < 0.2


def test_every_word_of_a_held_out_caption_is_in_training_captions() -> None:
    rng = random.Random(0)
    words = {word.strip(".").lower() for caption in sentences() for word in caption.split()}
    for kind in kinds(held=True):
        scene = scene_of(kind, rng)
        assert set(plain_caption(scene).split()) <= words
        assert {kind.colour, kind.shape} <= set(plain_caption(scene).split())
        assert kind.shape in draw_caption(scene, rng).lower()


def test_a_hundred_held_out_captions_differ() -> None:
    scenes = held_out_scenes(100)
    assert len({plain_caption(scene) for scene in scenes}) == 100
    assert {thing.kind for scene in scenes for thing in scene.things} == set(kinds(held=True))
    with pytest.raises(ValueError, match="1000 captions are asked for; held-out kinds have 2"):
        held_out_scenes(1000)


def test_clips_are_the_same_for_the_same_seed_and_in_range() -> None:
    clips = render(draw_scenes(3, seed=7))
    assert clips.shape == (3, 3, FRAMES, HEIGHT, WIDTH)
    assert clips.abs().max() <= 1
    assert torch.equal(clips, render(draw_scenes(3, seed=7)))
    assert not torch.equal(clips, render(draw_scenes(3, seed=8)))


@pytest.mark.parametrize("motion", MOTIONS)
def test_measuring_finds_what_was_drawn_also_behind_blur_and_noise(motion: str) -> None:
    rng = random.Random(MOTIONS.index(motion))
    choices = [kind for kind in kinds(held=True) + kinds(held=False) if kind.motion == motion]
    scenes = [scene_of(rng.choice([k for k in choices if k.shape == shape]), rng) for shape in SHAPES[1:]]
    for scene, clip in zip(scenes, render(scenes), strict=True):
        blurred = F.avg_pool2d(clip.transpose(0, 1), 3, 1, 1, count_include_pad=False).transpose(0, 1)
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
        found = agreement(scene, measure(blurred + 0.06 * noise))
        assert all(found.values()), (plain_caption(scene), found)


@pytest.mark.processes
def test_an_mp4_shows_what_was_drawn() -> None:
    (scene,) = held_out_scenes(1)
    clip = render([scene])[0]
    video = as_video(clip)
    assert video.shape == clip.shape and psnr(video, clip) > 30
    assert agreement(scene, measure(video))["all"]


def test_measuring_two_things() -> None:
    scene = next(scene for scene in draw_scenes(50, seed=3) if len(scene.things) == 2)
    assert agreement(scene, measure(render([scene])[0]))["all"]


def test_measuring_sees_what_is_wrong() -> None:
    scenes = draw_scenes(400, seed=4)
    red = next(s for s in scenes if len(s.things) == 1 and s.things[0].kind[::2] == ("red", "left"))
    clip = render([red])[0]
    backwards = agreement(red, measure(clip.flip(1)))
    assert not backwards["motion"] and backwards["colour"] and backwards["shape"]
    still = agreement(red, measure(clip[:, :1].expand_as(clip)))
    assert not still["motion"]
    assert not agreement(red, measure(torch.zeros_like(clip)))["number"]
    assert not agreement(red, measure(clip.flip(0)))["colour"], "red and blue are swapped"


def test_a_batch_gives_what_single_clips_give() -> None:
    """The one row that stands for all the padding is exact."""
    grid, lengths = (2, 2, 3), torch.tensor([3, 1])
    batched, single = BatchedModel(SMOKE.expert(16)), WanModel(SMOKE.expert(16))
    initialise(batched, 0)
    for parameter in batched.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(torch.device("cpu"), parameter.numel())))
    single.load_state_dict(batched.state_dict())
    random_ = torch.Generator().manual_seed(1)
    tokens, rows = torch.randn(2, 12, 64, generator=random_), torch.randn(2, 6, SMOKE.text_dim, generator=random_)
    rows *= (torch.arange(6) < lengths[:, None])[..., None]
    timestep, rope = torch.tensor([999.0, 12.5]), rope_table(grid, 128)
    together = batched.velocity(tokens, timestep, rows, lengths, rope)
    for i in range(2):
        alone = single(tokens[i], timestep[i : i + 1], Context(pad_text(rows[i])), rope)
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)


def test_a_widened_expert_begins_as_it_was_and_a_new_lora_changes_nothing() -> None:
    narrow = BatchedModel(SMOKE.expert(16))
    initialise(narrow, 0)
    for parameter in (narrow.head.head.weight, narrow.blocks[0].modulation):
        nn.init.normal_(parameter)
    random_ = torch.Generator().manual_seed(1)
    latents, image = torch.randn(2, 12, 4, 16, generator=random_), torch.randn(2, 12, 4, 20, generator=random_)
    timestep, rope = torch.tensor([9.0, 900.0]), rope_table((2, 2, 3), 128)
    inputs = timestep, torch.zeros(2, 3, SMOKE.text_dim), torch.ones(2, dtype=torch.long), rope
    before = narrow.velocity(latents.flatten(2), *inputs)
    both = torch.cat((latents, image), 3).flatten(2)
    wide = widened(narrow)
    assert wide.config.in_dim == IN_DIM
    torch.testing.assert_close(wide.velocity(both, *inputs), before)
    update = Update(narrow, 2, seed=0)
    same = student(narrow, update, latents.flatten(2), *inputs)
    torch.testing.assert_close(same, before)
    for up in update.up:
        up.add_(0.1)
    assert not torch.allclose(student(narrow, update, latents.flatten(2), *inputs), same)


def test_each_expert_trains_on_its_side_of_the_boundary() -> None:
    random_ = torch.Generator().manual_seed(0)
    high, low = (T2V.sigmas(side, 1000, random_) for side in (False, True))
    assert high.min() >= T2V.boundary > low.max()
    assert high.max() <= 1 and low.min() >= 0


def test_training_codes_clips_as_the_pack_does() -> None:
    vae = build(SMOKE)
    for parameter in vae.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(torch.device("cpu"), parameter.numel())))
    clip = render(draw_scenes(1, seed=0))[:, :, :9, 16:32, 32:48]
    latents = encode_clip(vae, clip)
    torch.testing.assert_close(encode(vae, clip), latents, atol=1e-5, rtol=1e-4)
    frames = torch.cat(list(decode_frames(vae, latents)), 1)
    torch.testing.assert_close(decode(vae, latents)[0].clamp(-1, 1), frames, atol=1e-5, rtol=1e-4)
    assert encode(vae, clip[:, :, :1]).shape == (1, Z_DIM, 1, 2, 2)


def test_folding_gives_the_packs_latents_mean_0_and_deviation_1_and_changes_no_picture() -> None:
    vae = build(SMOKE)
    clip = render(draw_scenes(1, seed=0))[:, :, :5, :32, :32]
    before = encode_clip(vae, clip)
    picture = torch.cat(list(decode_frames(vae, before)), 1)
    released = denormalise(before, Z_DIM).transpose(0, 1).flatten(1)
    fold_statistics(vae, released.mean(1), released.std(1))
    latents = encode_clip(vae, clip)
    flat = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(Z_DIM), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(Z_DIM), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cat(list(decode_frames(vae, latents)), 1), picture, atol=1e-4, rtol=1e-3)


def test_the_vae_learns_a_picture() -> None:
    vae = build(SMOKE).requires_grad_(True)
    picture = render(draw_scenes(1, seed=0))[:, :, :1, 16:32, 32:48]
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    errors = []
    for _ in range(15):
        with torch.enable_grad():
            error = (decode(vae, encode(vae, picture)) - picture).abs().mean()
        error.backward()
        optimiser.step()
        optimiser.zero_grad()
        errors.append(float(error))
    assert errors[-1] < 0.5 * errors[0]


def test_the_vae_sees_pictures_then_clips_short_and_whole() -> None:
    steps = (0, *range(SMOKE.vae_pictures, SMOKE.vae_pictures + 4))
    seen = [training_clips(step, SMOKE, torch.device("cpu")) for step in steps]
    assert [clips.shape[2] for clips in seen] == [1, 5, 5, 5, FRAMES]
    assert seen[3][0, :, 1:].eq(0).all() and not seen[3][1, :, 1:].eq(0).all(), "half as an I2V model's conditioning"


def test_pixels_of_things_weigh_more() -> None:
    clips = render(draw_scenes(4, seed=0))
    weights = emphasis(clips)
    torch.testing.assert_close(weights.mean((1, 2, 3, 4)), torch.ones(4))
    thing = (clips - clips[:, :, :, :1, :1]).abs().amax(1, keepdim=True) > 0.5
    assert weights[thing].mean() > 2 * weights[~thing].mean()


def test_a_text_encoder_that_was_read_has_the_parameters_of_a_new_one(tmp_path: Path) -> None:
    new = small_umt5.build(SMOKE, spiece := small_umt5.train_spiece())
    small_umt5.save(tmp_path, new.model, spiece)
    again = small_umt5.load(tmp_path, torch.device("cpu"))
    shapes = [[(name, p.shape) for name, p in each.model.named_parameters()] for each in (new, again)]
    assert shapes[0] == shapes[1]
    ids = small_umt5.pad_ids([again.tokenizer("a red circle moves left")], 16)
    torch.testing.assert_close(
        small_umt5.encode(again.model, ids)[0], small_umt5.encode(new.model, ids)[0], atol=2e-2, rtol=0
    )


def test_a_run_cut_into_two_calls_ends_as_an_uncut_one(tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)

        def losses(step: int) -> dict[str, torch.Tensor]:
            return {"square": model(torch.randn(4, 3, generator=generator(torch.device("cpu"), step))).square().mean()}

        budget = Budget(seconds=60, steps=steps)
        curve = fit("part", model, losses, folder=folder, budget=budget, learning_rate=3e-3, warm_up=5)
        assert [step for step, _ in curve] == list(range(10, steps + 1, 10))
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = train(tmp_path / "whole", 40)
    first = train(tmp_path / "cut", 20)
    second = train(tmp_path / "cut", 40)
    for name, tensor in whole.items():
        assert torch.equal(second[name], tensor)
        assert not torch.equal(first[name], tensor)
    assert (tmp_path / "cut" / "curves" / "part.svg").read_text() == (
        tmp_path / "whole" / "curves" / "part.svg"
    ).read_text()
    assert whole["weight"].abs().max() < 1, "and it learns"
    (tmp_path / "cut" / "state" / "part.pt").unlink()
    assert train(tmp_path / "cut", 60)["weight"].abs().max() < 1, "the curve alone says how far it was"


def test_the_files_fit_the_repository() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    tokenizer = Tokenizer(small_umt5.train_spiece())
    with torch.device("meta"):
        experts = [BatchedModel(FULL.expert(channels)) for channels in (16, 16, IN_DIM, IN_DIM)]
        umt5 = FULL.text_dim * (tokenizer.vocab + FULL.text_layers * 20 * FULL.text_dim)
    lora = Update(BatchedModel(FULL.expert(16)), FULL.lora_rank, 0)
    sizes = [2 * each for each in (*map(count, experts), count(build(FULL)), umt5, count(lora), count(lora))]
    # Beside the numbers a file has a header.
    assert max(sizes) < MAX_FILE - (1 << 20)
    assert sum(sizes) < MAX_ALL - (1 << 20)
    assert small_umt5.longest(tokenizer) < 64
    assert set(COLOURS) & set(BACKGROUNDS) == {"white"}


def test_the_demo_takes_the_trained_model_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    monkeypatch.setattr(demo, "TRAINED", tmp_path / "trained")
    file = place(tmp_path / "trained", NAMES.low_noise)
    file.parent.mkdir(parents=True)
    file.touch()
    prompt = demo._workflow(models)
    assert node_of(prompt, "LoadWanVideoModel")["inputs"]["low_noise"] == NAMES.low_noise
    assert node_of(prompt, "WanVideoDistributedInference")["inputs"]["num_frames"] == FRAMES
    assert node_of(prompt, "WanVideoTextEncode")["inputs"]["positive_prompt"] == demo.CAPTION
    assert place(models, NAMES.low_noise).resolve() == file
