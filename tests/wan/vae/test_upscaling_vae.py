"""VAEs by what their decoder makes: the video's size, twice the size, or something that is refused with its header."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_pack.wan.model.latent_space import WAN21, WAN22
from wan_pack.wan.vae.autoencoder import _build, decode_frames, encode, load_vae, upscale
from wan_pack.wan.vae.latents import denormalise
from wan_pack.wan.vae.preview import preview_of_vae
from wan_pack.wan.vae.vae_keys import VaeInfo, check_vae_file, module_names, vae_shapes

MODELS = {
    kind: GOLDEN / case / "vae" / "model.safetensors" for kind, case in ((WAN21, "vae_wan21"), (WAN22, "vae_wan22"))
}


def with_head(path: Path, weight: Tensor, bias: Tensor, kind=WAN21) -> Path:
    save_file(load_file(MODELS[kind]) | {"decoder.head.2.weight": weight, "decoder.head.2.bias": bias}, path)
    return path


def test_a_decoder_of_12_channels_makes_twice_the_size(tmp_path: Path):
    state = load_file(MODELS[WAN21])
    weight, bias = state["decoder.head.2.weight"], state["decoder.head.2.bias"]
    latents = load_file(GOLDEN / "vae_wan21" / "io.safetensors")["latents"]
    plain = torch.cat(list(decode_frames(load_vae([MODELS[WAN21]]), latents)), dim=1)
    # Four equal pixels for each: the plain picture, enlarged.
    four = with_head(tmp_path / "four.safetensors", *(part.repeat_interleave(4, 0) for part in (weight, bias)))
    info = check_vae_file(four)
    assert (info.kind, info.upscale) == (WAN21, 2)
    vae = load_vae([four])
    twice = torch.cat(list(decode_frames(vae, latents)), dim=1)
    assert upscale(vae) == 2 and twice.shape == (*plain.shape[:2], 2 * plain.shape[2], 2 * plain.shape[3])
    torch.testing.assert_close(twice, F.interpolate(plain, scale_factor=2, mode="nearest"), rtol=1e-5, atol=1e-6)
    # And each channel at its place, by diffusers' decoder and torch's pixel shuffle.
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(12, *weight.shape[1:], generator=generator) * 0.1
    vae = load_vae([with_head(tmp_path / "any.safetensors", head, torch.randn(12, generator=generator) * 0.1)])
    with torch.no_grad():
        channels = vae.decode(denormalise(latents, 16)).sample[0]
    shuffled = F.pixel_shuffle(channels.transpose(0, 1), 2).transpose(0, 1)
    torch.testing.assert_close(torch.cat(list(decode_frames(vae, latents)), dim=1), shuffled, rtol=1e-4, atol=1e-5)
    video = load_file(GOLDEN / "vae_wan21" / "io.safetensors")["video"]
    assert torch.equal(encode(vae, video), encode(load_vae([MODELS[WAN21]]), video))


def test_its_preview_has_the_videos_size(tmp_path: Path):
    state = load_file(MODELS[WAN21])
    parts = (state[f"decoder.head.2.{name}"].repeat_interleave(4, 0) for name in ("weight", "bias"))
    plain, twice = load_vae([MODELS[WAN21]]), load_vae([with_head(tmp_path / "v.safetensors", *parts)])
    torch.testing.assert_close(preview_of_vae(twice).weight, preview_of_vae(plain).weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "channels"), [(WAN21, 4), (WAN21, 6), (WAN21, 27), (WAN22, 3), (WAN22, 48)])
def test_other_decoders_are_refused_by_what_they_make(tmp_path: Path, kind, channels: int):
    weight = load_file(MODELS[kind])["decoder.head.2.weight"]
    path = with_head(tmp_path / "v.safetensors", torch.zeros(channels, *weight.shape[1:]), torch.zeros(channels), kind)
    for attempt in (check_vae_file, lambda file: load_vae([file])):
        with pytest.raises(
            ValueError, match=rf"v\.safetensors is a {kind.vae} whose decoder makes {channels} channels"
        ):
            attempt(path)


INFOS = {
    "Wan2.1": VaeInfo(WAN21, 8, 8, 1, "", True),
    "Wan2.1 twice": VaeInfo(WAN21, 4, 12, 2, "", True),
    "Wan2.2": VaeInfo(WAN22, 4, 8, 1, "", True),
}


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_shapes_are_those_of_diffusers(info: VaeInfo):
    official = {theirs: ours for ours, theirs in module_names(info.kind).items()}
    real = {}
    for name, parameter in _build(info).state_dict().items():
        module, _, leaf = name.rpartition(".")
        real[f"{official[module]}.{leaf}"] = tuple(parameter.shape)
    assert vae_shapes(info) == real


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.vae)
def test_every_wrong_shape_is_refused_with_the_header(tmp_path: Path, kind):
    shapes = {name: list(tensor.shape) for name, tensor in load_file(MODELS[kind]).items()}
    path = tmp_path / "w.safetensors"
    header_only(path, shapes)
    check_vae_file(path)
    for name, (*others, last) in shapes.items():
        header_only(path, shapes | {name: [*others, last + 1]})
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            check_vae_file(path)


def header_only(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of such tensors, whose values are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape)
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
