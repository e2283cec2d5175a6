"""Tensor names and sizes of the Wan video VAEs, and the check of a VAE file's header."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.headers import check_shape
from ..files.identify import describe_tensors, prefixes
from ..files.stored_model import StoredModel, open_model
from ..model.latent_space import LATENT_SPACES, WAN21, WAN22, LatentSpace

if TYPE_CHECKING:
    from ..files.stored_tensor import StoredTensor

EXPECTED = " or ".join(f"a {space.vae} ({space.example})" for space in LATENT_SPACES.values())

STAGES = 4
WIDTHS = (1, 2, 4, 4)
"""Channels of the stages, in those of the first."""
_PIXEL_CHANNELS = {WAN21: 3, WAN22: 12}
"""Of a picture, which the Wan2.2 VAE takes and gives in cells of 2 x 2 pixels."""
_SIZES = {1: "the video's size", 2: "twice the size, by pixel shuffle"}
RES_BLOCKS = 2
"""Residual blocks per stage of the encoder; the decoder has one more."""

_OFFICIAL_MARKER = "decoder.middle.0.residual.0.gamma"
_DIFFUSERS_MARKER = "decoder.mid_block.resnets.0.norm1.gamma"


@dataclass(frozen=True, slots=True)
class VaeInfo:
    """One VAE file."""

    kind: LatentSpace
    base_dim: int
    """Channels of the encoder's first stage."""
    decoder_base_dim: int
    """Channels of the decoder's last stage."""
    upscale: int
    """Pixels per row and column for one of the video that was encoded: 2 for a decoder of twice the size."""
    prefix: str
    """In front of every tensor name."""
    official: bool
    """Official names (ComfyUI keeps them) rather than diffusers'."""

    @property
    def z_dim(self) -> int:
        """Latent channels."""
        return self.kind.channels

    def name(self, official: str) -> str:
        """Official tensor name -> that in the file."""
        module, _, leaf = official.rpartition(".")
        return f"{self.prefix}{module if self.official else module_names(self.kind)[module]}.{leaf}"


def module_names(kind: LatentSpace) -> dict[str, str]:
    """Official module path -> diffusers module path, for every convolution and norm of a VAE.

    Holds the shortcut of every residual block; a block whose width does not change has none.
    """
    names = {"conv1": "quant_conv", "conv2": "post_quant_conv"}

    def add_resnet(official: str, diffusers: str) -> None:
        for ours, theirs in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
            names[f"{official}.residual.{ours}"] = f"{diffusers}.{theirs}"
        names[f"{official}.shortcut"] = f"{diffusers}.conv_shortcut"

    def add_resample(official: str, diffusers: str, temporal: bool) -> None:
        for part in ("resample.1", "time_conv") if temporal else ("resample.1",):
            names[f"{official}.{part}"] = f"{diffusers}.{part}"

    for side in ("encoder", "decoder"):
        names[f"{side}.conv1"] = f"{side}.conv_in"
        names[f"{side}.head.0"] = f"{side}.norm_out"
        names[f"{side}.head.2"] = f"{side}.conv_out"
        add_resnet(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        add_resnet(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
        for part in ("norm", "to_qkv", "proj"):
            names[f"{side}.middle.1.{part}"] = f"{side}.mid_block.attentions.0.{part}"

    nested = kind == WAN22
    for stage in range(STAGES):
        last = stage == STAGES - 1
        # Encoder: the first stage halves the frame only, the next two halve time as well; the decoder mirrors it.
        for stem, count, theirs, resampler, temporal in (
            ("encoder.downsamples", RES_BLOCKS + 1, "encoder.down_blocks", "downsampler", stage > 0),
            ("decoder.upsamples", RES_BLOCKS + 2, "decoder.up_blocks", "upsampler", stage < STAGES - 2),
        ):
            *blocks, resample = _flat(stem, stage, count, nested)
            # diffusers counts a Wan2.1 encoder's steps in one row, as the official names do.
            in_a_row = not nested and stem.startswith("encoder")
            for block, name in enumerate(blocks):
                add_resnet(
                    name, f"{theirs}.{stage * count + block}" if in_a_row else f"{theirs}.{stage}.resnets.{block}"
                )
            if not last:
                own = f"{stage}.{resampler}" + ("" if nested else "s.0")
                add_resample(resample, f"{theirs}.{stage * count + len(blocks) if in_a_row else own}", temporal)
    return names


def vae_info(stored: StoredModel) -> VaeInfo:
    """Recognises a VAE by its names and reads its sizes off its shapes.

    Raises:
        ValueError: not a Wan VAE, one that lacks tensors, or one of sizes that are not read.
    """
    names, shapes, path = stored.tensors, stored.shapes, stored.label
    found = [(p, marker) for marker in (_OFFICIAL_MARKER, _DIFFUSERS_MARKER) for p in prefixes(names, (marker,))]
    if not found:
        raise ValueError(f"{path} is {describe_tensors(names)}; expected {EXPECTED}")
    prefix, marker = found[0]
    official = marker == _OFFICIAL_MARKER
    nested = (
        "decoder.upsamples.0.upsamples.0.residual.2.weight"
        if official
        else "decoder.up_blocks.0.upsampler.resample.1.weight"
    )
    kind = WAN22 if prefix + nested in names else WAN21
    info = VaeInfo(kind, 0, 0, 1, prefix, official)

    def first_size(name: str) -> int:
        shape = shapes.get(info.name(name), ())
        if not shape or not shape[0]:
            raise ValueError(f"{path} is damaged: tensor {info.name(name)} of a {kind.vae} has shape {list(shape)}")
        return shape[0]

    _check_there(stored, kind, map(info.name, _leaves(kind)))
    latents = first_size("conv2.weight")
    if latents != kind.channels:
        raise ValueError(f"{path} is a {kind.vae} with {latents} latent channels; expected {kind.channels} of them")
    pixels, made = _PIXEL_CHANNELS[kind], first_size("decoder.head.2.weight")
    scales = {pixels * scale**2: scale for scale in (1, 2) if scale == 1 or kind == WAN21}
    if made not in scales:
        raise ValueError(
            f"{path} is a {kind.vae} whose decoder makes {made} channels; expected "
            + " or ".join(f"{count} ({_SIZES[scale]})" for count, scale in scales.items())
        )
    base = first_size("encoder.conv1.weight"), first_size("decoder.head.0.gamma")
    return VaeInfo(kind, *base, scales[made], prefix, official)


def vae_weights(stored: StoredModel, info: VaeInfo) -> dict[str, StoredTensor]:
    """By official name. Raises ValueError for a weight that is missing, cannot be read or has another shape."""
    shapes = vae_shapes(info)
    own = {info.name(name): name for name in shapes}
    _check_there(stored, info.kind, own)
    owners = {name.rpartition(".")[0]: to.rpartition(".")[0] for name, to in own.items()}
    beside = {
        name: f"{owners[owner]}{name.removeprefix(owner)}"
        for name in stored.tensors
        if (owner := name.rpartition(".")[0]) in owners
    }
    try:
        weights = stored.weights(beside)
    except ValueError as error:
        raise ValueError(f"{stored.label}: {error}") from error
    for name, shape in shapes.items():
        check_shape(info.name(name), weights[name].shape, shape, stored.label)
    return weights


def _check_there(stored: StoredModel, kind: LatentSpace, names: Iterable[str]) -> None:
    missing = sorted(name for name in names if name not in stored.tensors)
    if missing:
        raise ValueError(
            f"{stored.label} is a {kind.vae} that lacks {len(missing)} tensors ({', '.join(missing[:3])}); "
            f"expected {EXPECTED}"
        )


def check_vae_file(path: str | Path) -> VaeInfo:
    """Reads the header only: is this a complete Wan VAE, and which.

    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    stored = open_model([path], EXPECTED)
    info = vae_info(stored)
    vae_weights(stored, info)
    return info


def vae_shapes(info: VaeInfo) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of a VAE of known sizes."""
    shapes: dict[str, tuple[int, ...]] = {}
    residual, pixels, z = info.kind == WAN22, _PIXEL_CHANNELS[info.kind], info.kind.channels

    def conv(name: str, out: int, into: int, *kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, *kernel), (out,)

    def norm(name: str, channels: int, dims: int) -> None:
        shapes[f"{name}.gamma"] = (channels, *(1,) * dims)

    def block(name: str, into: int, out: int) -> None:
        norm(f"{name}.residual.0", into, 3)
        conv(f"{name}.residual.2", out, into, 3, 3, 3)
        norm(f"{name}.residual.3", out, 3)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def ends(side: str, into: int, first: int, middle: int, last: int, out: int) -> None:
        conv(f"{side}.conv1", first, into, 3, 3, 3)
        block(f"{side}.middle.0", middle, middle)
        norm(f"{side}.middle.1.norm", middle, 2)
        conv(f"{side}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
        conv(f"{side}.middle.1.proj", middle, middle, 1, 1)
        block(f"{side}.middle.2", middle, middle)
        norm(f"{side}.head.0", last, 3)
        conv(f"{side}.head.2", out, last, 3, 3, 3)

    conv("conv1", 2 * z, 2 * z, 1, 1, 1)
    conv("conv2", z, z, 1, 1, 1)
    down = [info.base_dim * times for times in (1, *WIDTHS)]
    ends("encoder", pixels, down[0], down[-1], down[-1], 2 * z)
    up = [info.decoder_base_dim * times for times in (WIDTHS[-1], *WIDTHS[::-1])]
    ends("decoder", z, up[0], up[0], up[-1], pixels * info.upscale**2)
    for stage in range(STAGES):
        last = stage == STAGES - 1
        into, out = down[stage : stage + 2]
        names = _flat("encoder.downsamples", stage, RES_BLOCKS + 1, residual)
        for i, name in enumerate(names[:-1]):
            block(name, into if i == 0 else out, out)
        if not last:
            conv(f"{names[-1]}.resample.1", out, out, 3, 3)
            if stage > 0:
                conv(f"{names[-1]}.time_conv", out, out, 3, 1, 1)
        into, out = up[stage : stage + 2]
        # The Wan2.1 decoder's upsampling halves the channels.
        into = into // 2 if stage > 0 and not residual else into
        names = _flat("decoder.upsamples", stage, RES_BLOCKS + 2, residual)
        for i, name in enumerate(names[:-1]):
            block(name, into if i == 0 else out, out)
        if not last:
            conv(f"{names[-1]}.resample.1", out if residual else out // 2, out, 3, 3)
            if stage < STAGES - 2:
                conv(f"{names[-1]}.time_conv", 2 * out, out, 3, 1, 1)
    return shapes


def _flat(stem: str, stage: int, count: int, nested: bool) -> list[str]:
    inner = stem.rpartition(".")[2]
    return [f"{stem}.{stage}.{inner}.{i}" if nested else f"{stem}.{stage * count + i}" for i in range(count)]


def _leaves(kind: LatentSpace) -> list[str]:
    """Official tensor names, but of shortcuts: blocks whose width does not change have none."""
    return [
        f"{module}.{leaf}"
        for module in module_names(kind)
        for leaf in (("gamma",) if module.endswith(_NORMS) else ("weight", "bias"))
        if not module.endswith("shortcut")
    ]


_NORMS = ("residual.0", "residual.3", "head.0", "middle.1.norm")
