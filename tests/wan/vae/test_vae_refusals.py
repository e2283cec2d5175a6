"""What is said of VAEs and videos that are not taken, and what becomes of values beyond the range of a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_pack.wan.model.latent_space import WAN21, WAN22
from wan_pack.wan.vae.autoencoder import check_video, decode_frames, load_vae, upscale
from wan_pack.wan.vae.latents import denormalise, normalise
from wan_pack.wan.vae.vae_keys import EXPECTED, VaeInfo, check_vae_file, module_names

MODELS = {
    kind: GOLDEN / case / "vae" / "model.safetensors" for kind, case in ((WAN21, "vae_wan21"), (WAN22, "vae_wan22"))
}


def refusal(path: Path, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, path)
    with pytest.raises(ValueError) as refused:
        check_vae_file(path)
    return str(refused.value)


def test_what_a_vae_lacks_is_named_in_order(tmp_path: Path) -> None:
    """Three of them."""
    path, official = tmp_path / "v.safetensors", load_file(MODELS[WAN21])
    lacking = {name: value for name, value in official.items() if not name.startswith("encoder.middle.2.")}
    assert refusal(path, lacking) == (
        f"{path} is a Wan2.1 VAE that lacks 6 tensors (encoder.middle.2.residual.0.gamma, "
        f"encoder.middle.2.residual.2.bias, encoder.middle.2.residual.2.weight); expected {EXPECTED}"
    )


@pytest.mark.parametrize(("kind", "words"), [
    (WAN21, "4 channels; expected 3 (the video's size) or 12 (twice the size, by pixel shuffle)"),
    (WAN22, "4 channels; expected 12 (the video's size)"),
])  # fmt: skip
def test_sizes_that_a_vae_cannot_have_are_told_with_those_that_it_can(tmp_path: Path, kind, words: str) -> None:
    path, official = tmp_path / "v.safetensors", load_file(MODELS[kind])

    def other(name: str, value: Tensor) -> str:
        return refusal(path, official | {name: value})

    head = official["decoder.head.2.weight"]
    assert (
        other("decoder.head.2.weight", torch.zeros(4, *head.shape[1:]))
        == f"{path} is a {kind.vae} whose decoder makes {words}"
    )
    assert other("conv2.weight", torch.zeros(8, 8, 1, 1, 1)) == (
        f"{path} is a {kind.vae} with 8 latent channels; expected {kind.channels} of them"
    )
    for name in ("conv2.weight", "decoder.head.2.weight", "encoder.conv1.weight", "decoder.head.0.gamma"):
        for shape in ((), (0, 3)):
            assert other(name, torch.zeros(shape)) == (
                f"{path} is damaged: tensor {name} of a {kind.vae} has shape {list(shape)}"
            )


def test_names_in_a_file_are_those_that_it_has() -> None:
    official, theirs = (VaeInfo(WAN22, 4, 8, 1, "vae.", official) for official in (True, False))
    assert official.name("conv2.bias") == "vae.conv2.bias"
    assert theirs.name("conv2.bias") == "vae.post_quant_conv.bias"
    name = "decoder.upsamples.1.upsamples.3.time_conv.weight"
    assert theirs.name(name) == "vae.decoder.up_blocks.1.upsampler.time_conv.weight"
    assert module_names(WAN21)["encoder.downsamples.5.time_conv"] == "encoder.down_blocks.5.time_conv"
    assert theirs.z_dim == 48


def test_a_video_that_no_vae_takes_is_refused_with_what_it_is() -> None:
    vae = load_vae([MODELS[WAN21]])
    for shape in ((3, 5, 16, 16), (2, 3, 5, 16, 16), (1, 4, 5, 16, 16), (1, 3, 5, 16, 16, 1)):
        with pytest.raises(ValueError, match=r"^the video has shape \[.*\]; it must be \[1, 3, F, H, W\]$") as refused:
            check_video(vae, torch.zeros(shape))
        assert str(list(shape)) in str(refused.value)
    for frames, height, width in ((4, 16, 24), (6, 16, 24), (5, 12, 24), (5, 16, 28)):
        with pytest.raises(ValueError) as refused:
            check_video(vae, torch.zeros(1, 3, frames, height, width))
        assert str(refused.value) == (
            f"the video has {frames} frames of {width}x{height}; it must have 4n + 1 frames whose width and height are "
            "multiples of 8"
        )
    for frames in (1, 5, 9):
        check_video(vae, torch.zeros(1, 3, frames, 16, 24))
    for shape in ((16, 3, 2, 2), (2, 16, 3, 2, 2)):
        with pytest.raises(ValueError) as refused:
            next(decode_frames(vae, torch.zeros(shape)))
        assert str(refused.value) == f"latents have shape {list(shape)}; it must be [1, 16, T, h, w]"


def test_latents_of_another_shape_are_refused() -> None:
    for shape in ((48, 2, 3, 4), (16, 3, 4), (16, 2, 3, 4, 5)):
        for scale in (normalise, denormalise):
            with pytest.raises(ValueError) as refused:
                scale(torch.zeros(shape), 16)
            assert str(refused.value) == f"latents have shape {list(shape)}; it must be [..., 16, T, h, w]"
    assert normalise(torch.zeros(2, 5, 16, 1, 1, 1), 16).shape == (2, 5, 16, 1, 1, 1)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.vae)
def test_a_picture_ends_at_its_range_unless_it_is_asked_for_whole(kind, tmp_path: Path) -> None:
    official = load_file(MODELS[kind])
    cells = len(official["decoder.head.2.bias"]) // 3
    official["decoder.head.2.weight"].zero_()
    levels = torch.tensor([2.0, -3.0, 0.5])
    official["decoder.head.2.bias"] = levels.repeat_interleave(cells)
    save_file(official, tmp_path / "v.safetensors")
    vae = load_vae([tmp_path / "v.safetensors"])
    latents = torch.zeros(1, kind.channels, 2, 2, 2)
    for clamp, expected in ((True, [1.0, -1.0, 0.5]), (False, [2.0, -3.0, 0.5])):
        frames = torch.cat(list(decode_frames(vae, latents, clamp=clamp)), dim=1)
        assert frames.shape == (3, 5, 2 * kind.stride, 2 * kind.stride)
        assert torch.equal(frames, torch.tensor(expected).view(3, 1, 1, 1).expand_as(frames))
    assert upscale(vae) == 1
