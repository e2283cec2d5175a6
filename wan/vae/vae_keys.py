"""Tensor names and sizes of the Wan video VAEs, and the check of a VAE file's header."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files.identify import describe_tensors
from ..files.model_index import ModelIndex, read_index
from ..model.latent_space import LATENT_SPACES, WAN21, WAN22, LatentSpace

EXPECTED = " or ".join(f"a {space.vae} ({space.example})" for space in LATENT_SPACES.values())

PREFIXES = ("", "model.", "vae.", "first_stage_model.")
"""In front of every name of the VAE, by who saved the file."""

STAGES = 4
RES_BLOCKS = 2
"""Residual blocks per stage of the encoder; the decoder has one more."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""What a weight may be stored as: it is only cast."""

_OFFICIAL_MARKER = "decoder.middle.0.residual.0.gamma"
_DIFFUSERS_MARKER = "decoder.mid_block.resnets.0.norm1.gamma"


@dataclass(frozen=True, slots=True)
class VaeInfo:
    """One VAE file. The sizes of a .pth are None where only loading it would tell."""

    z_dim: int
    """Latent channels."""
    base_dim: int | None
    """Channels of the encoder's first stage."""
    kind: LatentSpace
    decoder_base_dim: int | None
    """Channels of the decoder's last stage."""
    prefix: str
    """In front of every tensor name."""
    official: bool
    """Official names (ComfyUI keeps them) rather than diffusers'."""


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

    for stage in range(STAGES):
        last = stage == STAGES - 1
        # Encoder: the first stage halves the frame only, the next two halve time as well; the decoder mirrors it.
        down, up = (stage > 0, stage < STAGES - 2)
        for block in range(RES_BLOCKS + 1):
            resample = block == RES_BLOCKS
            flat = stage * (RES_BLOCKS + 1) + block
            if kind == WAN22:
                official = f"encoder.downsamples.{stage}.downsamples.{block}"
                diffusers = f"encoder.down_blocks.{stage}." + ("downsampler" if resample else f"resnets.{block}")
            else:
                official, diffusers = f"encoder.downsamples.{flat}", f"encoder.down_blocks.{flat}"
            if not resample:
                add_resnet(official, diffusers)
            elif not last:
                add_resample(official, diffusers, temporal=down)
        for block in range(RES_BLOCKS + 2):
            resample = block == RES_BLOCKS + 1
            flat = stage * (RES_BLOCKS + 2) + block
            upsampler = "upsampler" if kind == WAN22 else "upsamplers.0"
            diffusers = f"decoder.up_blocks.{stage}." + (upsampler if resample else f"resnets.{block}")
            official = f"decoder.upsamples.{stage}.upsamples.{block}" if kind == WAN22 else f"decoder.upsamples.{flat}"
            if not resample:
                add_resnet(official, diffusers)
            elif not last:
                add_resample(official, diffusers, temporal=up)
    return names


def diffusers_to_official(name: str, kind: LatentSpace) -> str:
    """A diffusers tensor name -> the official one, which ComfyUI's files keep. KeyError for a name no VAE has."""
    module, _, leaf = name.rpartition(".")
    return {theirs: ours for ours, theirs in module_names(kind).items()}[module] + "." + leaf


def vae_info(names: Collection[str], shapes: Mapping[str, tuple[int, ...]] | None, path: str | Path) -> VaeInfo:
    """Recognises a VAE by its names and reads its sizes off its shapes.

    Args:
        names: tensor names as in the file.
        shapes: name -> shape, or None if only the names are known.
        path: for messages.
    Raises:
        ValueError: not a Wan VAE, or one that lacks tensors.
    """
    found = [
        (prefix, marker)
        for prefix in PREFIXES
        for marker in (_OFFICIAL_MARKER, _DIFFUSERS_MARKER)
        if prefix + marker in names
    ]
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
    modules = module_names(kind)
    wanted = modules if official else modules.values()
    norms = _norms(official)
    missing = sorted(
        f"{module}.{leaf}"
        for module in wanted
        for leaf in (("gamma",) if module.endswith(norms) else ("weight", "bias"))
        if f"{prefix}{module}.{leaf}" not in names and not module.endswith("shortcut")
    )
    if missing:
        raise ValueError(
            f"{path} is a {kind.vae} that lacks {len(missing)} tensors ({', '.join(missing[:3])}); expected {EXPECTED}"
        )
    if shapes is None:
        return VaeInfo(kind.channels, None, kind, None, prefix, official)

    def first_size(official_module: str, leaf: str) -> int:
        name = f"{prefix}{official_module if official else modules[official_module]}.{leaf}"
        if not shapes[name] or not shapes[name][0]:
            raise ValueError(f"{path} is damaged: tensor {name} of a {kind.vae} has shape {list(shapes[name])}")
        return shapes[name][0]

    return VaeInfo(
        z_dim=first_size("conv2", "weight"),
        base_dim=first_size("encoder.conv1", "weight"),
        kind=kind,
        decoder_base_dim=first_size("decoder.head.0", "gamma"),
        prefix=prefix,
        official=official,
    )


def check_floats(index: ModelIndex, info: VaeInfo) -> None:
    """Raises ValueError for a VAE with a quantised weight: no release has one."""
    modules = module_names(info.kind)
    for module in modules if info.official else modules.values():
        for leaf in ("weight", "bias", "gamma"):
            tensor = (index.tensors or {}).get(f"{info.prefix}{module}.{leaf}")
            if tensor is not None and index.gguf is None and tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{index.label} stores {info.prefix}{module}.{leaf} as {tensor.dtype}; a {info.kind.vae} is read "
                    f"from {', '.join(FLOATS)}"
                )


def check_vae_file(path: str | Path) -> VaeInfo:
    """Reads the header only: is this a complete Wan VAE, and which.

    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    index = read_index([path], EXPECTED)
    info = vae_info(index.names, index.shapes, path)
    check_floats(index, info)
    if info.z_dim != info.kind.channels:
        raise ValueError(
            f"{path} is a {info.kind.vae} with {info.z_dim} latent channels; expected {info.kind.channels} of them"
        )
    return info


def _norms(official: bool) -> tuple[str, ...]:
    if official:
        return ("residual.0", "residual.3", "head.0", "middle.1.norm")
    return ("norm1", "norm2", "norm_out", "attentions.0.norm")
