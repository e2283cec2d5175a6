"""What a video is given beside its start: a reference picture in front, and what must stay while it is sampled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.sampling.conditioning import Conditioning, build_conditioning
from wan_pack.wan.sampling.control import build_controls
from wan_pack.wan.sampling.denoise import Guidance, Known, denoise
from wan_pack.wan.sampling.schedule import make_solver

ALWAYS = Guidance(low=1.0, high=1.0, boundary=0.9)


def encode(video: torch.Tensor) -> torch.Tensor:
    """Stands for a VAE: what it was given can be read off what it returns."""
    frames = (video.shape[2] - 1) // 4 + 1
    return video.mean() * torch.ones(1, 16, frames, video.shape[3] // 8, video.shape[4] // 8)


def build(
    inputs: dict[str, torch.Tensor], encode: Callable[[torch.Tensor], torch.Tensor] = encode, name: str = "Fun-Control"
) -> Conditioning:
    return build_conditioning(
        inputs, torch.zeros(16, 3, 4, 6), variant=VARIANTS[name], num_frames=9, sigma=1.0, add_noise=True,
        encode=encode,
    )  # fmt: skip


def velocity(expert: str, tokens: torch.Tensor, timestep: float, passes: tuple[bool, ...]) -> list[torch.Tensor]:
    return [torch.tanh(tokens) * timestep / 1000]


def test_a_reference_picture_is_encoded_by_itself_and_one_that_is_encoded_stays_as_it_is():
    seen: list[torch.Tensor] = []

    def watched(video: torch.Tensor) -> torch.Tensor:
        seen.append(video)
        return encode(video)

    picture, latent = torch.rand(3, 32, 48), torch.randn(16, 4, 6)
    made = build({"reference_images": picture[None]}, encode=watched).conditions.reference
    assert made is not None and torch.equal(seen[-1], picture[None, :, None])
    assert torch.equal(made.values, encode(picture[None, :, None])[0])
    given = build({"reference_latent": latent}).conditions.reference
    assert given is not None and torch.equal(given.values, latent[:, None])
    assert build({}).conditions.reference is None


def test_nothing_stays_but_what_a_model_keeps_and_is_given():
    """A picture stays in the latents of models that keep frames, and a mask is of given latents."""
    picture, mask = torch.rand(3, 32, 48), torch.zeros(3, 4, 6)
    assert build({"start_image": picture, "noise_mask": mask}).known is None
    samples = {"samples": torch.zeros(16, 3, 4, 6)}
    assert build(samples).known is None and build(samples | {"noise_mask": mask}).known_mask is not None


def test_a_vace_model_that_is_given_nothing_makes_all_of_the_videos_frames():
    sizes = []

    def watched(video: torch.Tensor) -> torch.Tensor:
        sizes.append(video.shape)
        return encode(video)

    made = build_conditioning(
        {}, torch.zeros(16, 3, 4, 6), variant=VARIANTS["VACE"], num_frames=9, sigma=1.0, add_noise=True, encode=watched
    ).conditions
    (control,) = made.controls
    assert sizes == [(1, 3, 9, 32, 48)] * 2 and control.strength == 1 and made.image is None
    assert control.values.shape == (96, 3, 4, 6) and not control.values[:32].any() and control.values[32:].eq(1).all()


def test_what_a_step_expects_keeps_what_is_known():
    """Also where the model says otherwise of it."""
    start, mask = torch.randn(4, 64), torch.zeros(4, 64, dtype=torch.bool)
    mask[1] = True
    known, seen = Known(torch.full((4, 64), 7.0), mask), list[torch.Tensor]()
    denoise(
        start, solver=make_solver("euler", 2, 5.0), guidance=ALWAYS, known=known, predict=velocity,
        on_estimate=lambda done, estimate: seen.append(estimate),
    )  # fmt: skip
    assert len(seen) == 2
    for estimate in seen:
        assert torch.equal(estimate[1], known.tokens[1]) and not torch.equal(estimate[0], known.tokens[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_a_vae_of_another_precision_encodes_is_float32(dtype: torch.dtype):
    """A VAE of a GPU gives bf16; what goes with it through the sampling is float32 on the CPU."""

    def other(video: torch.Tensor) -> torch.Tensor:
        return encode(video).to(dtype)

    pictures = torch.rand(1, 3, 32, 48)
    (control,) = build_controls(
        {"control_video": torch.rand(3, 9, 32, 48), "reference_images": pictures}, (9, 32, 48), other
    )
    mask = torch.ones(9, 32, 48, dtype=dtype)
    (plain,) = build_controls({"control_video": torch.rand(3, 9, 32, 48), "control_mask": mask}, (9, 32, 48), other)
    first = build_conditioning(
        {"start_image": pictures[0]}, torch.zeros(48, 3, 2, 3), variant=VARIANTS["TI2V-5B"], num_frames=9, sigma=1.0,
        add_noise=True, encode=lambda video: torch.full((1, 48, 1, 2, 3), 0.5, dtype=dtype),
    )  # fmt: skip
    assert first.known is not None and first.known.dtype == torch.float32 and first.known[:, 0].eq(0.5).all()
    made = build(
        {"reference_images": pictures, "start_image": pictures[0], "control_video": pictures.transpose(0, 1)},
        encode=other,
    ).conditions
    whole = build({"start_image": pictures[0]}, other, "I2V").conditions.image
    assert whole is not None and whole.dtype == torch.float32
    assert made.image is not None and made.reference is not None
    assert {each.dtype for each in (control.values, plain.values, made.image, made.reference.values)} == {torch.float32}
