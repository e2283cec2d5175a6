"""The picture of a video that is being sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from wan_pack.distributed.launch.changed_file import ChangedFile
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.live_preview import PreviewWriter
from wan_pack.wan.model.latent_space import LATENT_SPACES
from wan_pack.wan.model.patch import patchify, token_grid
from wan_pack.wan.sampling.denoise import Guidance, Known, denoise
from wan_pack.wan.sampling.schedule import make_solver
from wan_pack.wan.vae.autoencoder import load_vae
from wan_pack.wan.vae.preview import PreviewMap, fit_preview, is_due, preview_of_vae, smooth_noise, training_video


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_decoder(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [3 * n * n, C] and bias of a decoder that a linear map can copy; n preview pixels per latent and axis."""
    n = LATENT_SPACES[channels].stride // 4
    return 0.5 * noise(3 * n * n, channels, seed=1) / channels**0.5, 0.1 * noise(3 * n * n, seed=2)


def decoded(latents: torch.Tensor, decoder: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[C, T, h, w] -> [3, T, H, W]."""
    weight, bias = decoder
    cells = torch.einsum("kc,cthw->tkhw", weight, latents) + bias.view(1, -1, 1, 1)
    small = F.pixel_shuffle(cells, LATENT_SPACES[len(latents)].stride // 4)
    return F.interpolate(small, scale_factor=4, mode="nearest").transpose(0, 1)


@pytest.mark.parametrize("channels", [16, 48])
def test_a_linear_vae_is_recovered(channels: int):
    decoder, stride = linear_decoder(channels), LATENT_SPACES[channels].stride
    latents = noise(channels, 2, 16, 16)
    preview = fit_preview(latents, decoded(latents, decoder), stride)
    other = noise(channels, 1, 6, 10, seed=3)
    picture = preview.picture(other[:, 0])
    whole = decoded(other, decoder)[:, 0].clamp(-1, 1)
    assert picture.shape == (6 * stride // 4, 10 * stride // 4, 3)
    expected = (F.avg_pool2d(whole, 4).permute(1, 2, 0) + 1) * 127.5
    assert (picture.float() - expected).abs().max() <= 1.5, "levels of 255: rounding, and the wish for a small map"


@pytest.mark.parametrize("name", ["vae_wan21", "vae_wan22"])
def test_the_map_of_a_vae_is_of_its_size_and_shows_the_same_in_bfloat16(golden_folder: Path, name: str):
    """On average to a level of 255."""
    files, shown = sorted((golden_folder / name / "vae").iterdir()), []
    for dtype in (torch.float32, torch.bfloat16):
        vae = load_vae(files, dtype=dtype, device=torch.device("cpu"))
        shown.append(preview_of_vae(vae).picture(noise(vae.config.z_dim, 12, 20)).float())
    n = LATENT_SPACES[vae.config.z_dim].stride // 4
    assert shown[0].shape == (12 * n, 20 * n, 3)
    assert shown[0].std() > 10 and (shown[0] - shown[1]).abs().mean() < 1


def test_a_vae_at_rest_gives_grey_and_what_is_not_finite_a_picture():
    latents = torch.zeros(16, 2, 16, 16)
    preview = fit_preview(latents, torch.zeros(3, 2, 128, 128), 8)
    assert preview.picture(100 * noise(16, 4, 4)).float().sub(127.5).abs().max() <= 0.5
    assert preview.picture(torch.full((16, 4, 4), float("nan"))).shape == (8, 8, 3)


def test_previews_come_with_the_first_the_last_and_some_ten_steps():
    for total in (*range(1, 60), 1000):
        due = [done for done in range(1, total + 1) if is_due(done, total)]
        assert {1, total} <= set(due)
        assert min(total, 10) <= len(due) <= 21
    assert [done for done in range(1, 5) if is_due(done, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("solver", ["dpm++", "euler", "unipc"])
def test_the_estimates_change_nothing_and_are_the_video_of_a_straight_flow(solver: str):
    """A velocity that leads straight to `video` from everywhere: every estimate is that video."""
    video, start = noise(6, 64), noise(6, 64, seed=1)
    mask = torch.zeros(6, 64, dtype=torch.bool)
    mask[0] = True
    known = Known(7 * torch.ones(6, 64), mask)
    expected = known.impose(video)
    guidance = Guidance(low=1.0, high=1.0, boundary=0.9)

    def run(**callbacks) -> torch.Tensor:  # type: ignore[no-untyped-def]
        steps = make_solver(solver, 4, 5.0)
        level = dict(zip(steps.timesteps, steps.sigmas, strict=False))
        return denoise(
            start, solver=steps, guidance=guidance, known=known,
            predict=lambda expert, tokens, t, passes: [(tokens - expected) / level[t]], **callbacks,
        )  # fmt: skip

    seen: list[torch.Tensor] = []
    shown = run(on_estimate=lambda done, estimate: seen.append(estimate.clone()))
    assert torch.equal(shown, run())
    assert len(seen) == 4
    for estimate in seen:
        torch.testing.assert_close(estimate, expected, atol=1e-4, rtol=1e-4)


def test_the_middle_frame_is_written_when_it_is_due(tmp_path: Path):
    latents = torch.zeros(16, 3, 4, 6)
    latents[0, 1] = 1
    weight = torch.zeros(17, 12)
    weight[0] = 0.5
    path = tmp_path / "preview.jpg"
    file = ChangedFile(path, 1 << 20)
    writer = PreviewWriter(
        path, preview_map=PreviewMap(weight), grid=token_grid(tuple(latents.shape)), shard=SequenceShard(length=18),
        group=None, steps=40,
    )  # fmt: skip
    tokens = patchify(latents)
    assert file.read() is None
    writer(1, tokens)
    first = file.read()
    assert first is not None and first.startswith(b"\xff\xd8")
    writer(2, tokens)
    assert file.read() is None, "not due"
    writer(4, 2 * tokens)
    assert file.read() not in (None, first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["preview.jpg"]

    from PIL import Image

    with Image.open(path) as picture:
        assert picture.size == (12, 8)
        assert min(picture.convert("L").tobytes()) >= 253, "2 * 0.5 is white, and only in the middle frame"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert ChangedFile(path, 4).read() is None
    assert ChangedFile(path, 5).read() == b"12345"


def test_the_noise_that_a_preview_is_fitted_to_varies_in_every_channel():
    like = torch.empty(1, 5, 2, 8, 12)
    made = smooth_noise(like)
    assert made.shape == like.shape and made.square().mean() == pytest.approx(1.0, rel=1e-4)
    rows = made.flatten(2)[0]
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.7, "each its own"
    assert (made[..., 1:] - made[..., :-1]).square().mean() < 1.0, "neighbours are alike"


def test_the_wish_for_a_small_map_weighs_as_much_as_a_channel_of_that_mean_square():
    """A channel of mean square 1/1000, and nothing else to go by: half of what would fit it."""
    signs = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 4, 4)
    latents = signs * 1e-3**0.5
    frames = signs.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(3, 1, 32, 32)
    weight = fit_preview(latents, frames, 8).weight
    assert weight.dtype == torch.float32 and weight.shape == (2, 12)
    torch.testing.assert_close(weight[0], torch.full((12,), 0.5 * 1e-3**-0.5))
    torch.testing.assert_close(weight[1], torch.zeros(12), rtol=0, atol=1e-6)


def test_a_map_is_fitted_on_patches_of_every_size_down_to_its_pixels():
    video = training_video(64)
    assert video.shape == (1, 3, 5, 64, 64) and video.abs().max() < 1 and torch.equal(video, training_video(64))
    assert torch.equal(video, video[:, :, :1].expand_as(video)), "a still picture"
    cells = video[0, :, 0].unflatten(2, (16, 4)).unflatten(1, (16, 4))
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))
    cells = cells[:, :, 0, :, 0].double()
    # The mean of four cells says no more of a cell than the coarser patches: each scale adds its own.
    for side in (16, 8, 4, 2):
        inside = cells.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        cells = inside.mean((2, 4))
        assert (inside - cells[:, :, None, :, None]).std() > 0.1, side


def test_pictures_of_bf16_latents_are_those_of_the_same_in_float32():
    preview = fit_preview(noise(16, 2, 16, 16), noise(3, 2, 128, 128, seed=1).clamp(-1, 1), 8)
    latents = noise(16, 4, 6).bfloat16()
    picture = preview.picture(latents)
    assert picture.dtype == torch.uint8 and torch.equal(picture, preview.picture(latents.float()))


def test_levels_of_a_picture_are_rounded_and_end_at_black_and_white():
    weight = torch.zeros(2, 3)
    weight[0] = 1.0
    made = PreviewMap(weight).picture(torch.tensor([[[-2.0, -1.0, 0.0], [0.005, 1.0, 2.0]]]))
    assert made[..., 0].tolist() == [[0, 0, 128], [128, 255, 255]] and made.shape == (2, 3, 3)
