"""What a video is given beside its start: a reference picture in front, and what must stay while it is sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.sampling.conditioning import Conditioning, build_conditioning
from wan_pack.wan.sampling.denoise import Guidance, Known, denoise
from wan_pack.wan.sampling.schedule import make_solver

ALWAYS = Guidance(low=1.0, high=1.0, boundary=0.9)


def encode(video: torch.Tensor) -> torch.Tensor:
    """Stands for a VAE: what it was given can be read off what it returns."""
    frames = (video.shape[2] - 1) // 4 + 1
    return video.mean() * torch.ones(1, 16, frames, video.shape[3] // 8, video.shape[4] // 8)


def build(inputs: dict[str, torch.Tensor], encode: Callable[[torch.Tensor], torch.Tensor] = encode) -> Conditioning:
    return build_conditioning(
        inputs, torch.zeros(16, 3, 4, 6), variant=VARIANTS["Fun-Control"], num_frames=9, sigma=1.0, add_noise=True,
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
