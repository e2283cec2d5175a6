"""Models of true shapes with random weights, written in seconds: speed and memory do not depend on what weights are.

What does depend on it is the mp4: noise takes x264 several times as long as a picture. So the transformer's head is
small, which leaves latents that a job is given nearly as they are, and the decoder of the VAE blurs: its kernels are
random mixtures of channels with the same smooth kernel in space. Smooth latents that move give a smooth video that
moves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pack import mount_pack

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from wan_pack.wan.model.config import WanConfig

BLOCKS_PER_FILE = 4
"""Of an expert, 2.8 GB in T2V-A14B; one thread writes a file."""
THREADS = 16
WEIGHT_STD, HEAD_STD = 0.02, 0.0005
BANK = (1 << 24) - 3
"""Random numbers that are drawn; tensors are cut out of them, again and again. No row's length divides it."""
TEXT_SHAPES = {4096: (24, 64, 64, 10240, 256384), 64: (2, 4, 16, 128, 300)}
"""Channels of the text rows -> umT5's layers, heads, channels per head, ffn_dim, vocabulary: xxl, and a tiny one."""
EXPERTS = ("high_noise_model", "low_noise_model")

Fill = Callable[[str, "Tensor"], None]
"""Writes the values of the tensor of that name."""


def model_config(name: str) -> WanConfig:
    """A name in released_sizes.py; or tiny, tiny-i2v, tiny-5B, tiny-vace, tiny-animate for machines without a GPU."""
    from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
    from wan_pack.wan.model.config import WanConfig
    from wan_pack.wan.model.variants import VARIANTS

    channels = {
        "tiny": (16, 16), "tiny-i2v": (36, 16), "tiny-5B": (48, 48), "tiny-vace": (16, 16), "tiny-animate": (36, 16)
    }  # fmt: skip
    if name in WAN_CONFIGS:
        return WAN_CONFIGS[name]
    if name not in channels:
        raise ValueError(f"model is {name!r}; it must be one of {', '.join([*WAN_CONFIGS, *channels])}")
    in_dim, out_dim = channels[name]
    own: dict[str, dict[str, Any]] = {
        "tiny-vace": {"parts": frozenset({"vace_blocks"}), "vace_layers": (0, 1)},
        "tiny-animate": {"parts": VARIANTS["Animate"].parts, "face_blocks": 1},
    }
    return WanConfig(
        dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=in_dim, out_dim=out_dim, text_dim=64, freq_dim=256,
        **own.get(name, {}),
    )  # fmt: skip


def write_model(folder: Path, name: str, threads: int = THREADS) -> Path:
    """Experts (bf16, official layout) and VAE in folder/name, unless they are there. Returns that folder.

    Files of equal shapes are one file under several names: those of both experts, and nearly all of T2V and I2V. So
    57 GB of weights take 29 GB of disk and of the system's file cache.
    """
    import torch
    from wan_pack.wan.transformer.transformer import meta_model

    config, target = model_config(name), folder / name
    shapes = {key: tuple(p.shape) for key, p in meta_model(config, torch.bfloat16).named_parameters()}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        kind, number = (key.split(".") if key.startswith(("blocks.", "vace_blocks.")) else ("", ""))[:2]
        part = f"{kind}-{int(number) // BLOCKS_PER_FILE:02}" if number else "input" if "patch" in key else "outside"
        parts.setdefault(part, {})[key] = shape
    store = folder / "parts"
    store.mkdir(parents=True, exist_ok=True)
    files = {part: store / f"{_digest(own)}.safetensors" for part, own in parts.items()}
    numbers = bank()
    jobs = [
        (files[part], own, lambda key, out: fill_transformer(key, out, numbers))
        for part, own in parts.items()
        if not files[part].exists()
    ]
    # Each of them is one of many.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        vae, experts = pool.submit(write_vae, folder, name), [pool.submit(write_tensors, *job) for job in jobs]
        vae.result()
        for done in experts:
            done.result()
    for expert in EXPERTS[: 1 if config.variant.known_frames else 2]:
        _link_expert(target / expert, {files[part]: own for part, own in parts.items()}, config)
    return target


def write_vae(folder: Path, name: str) -> Path:
    """The VAE of that model, unless it is there."""
    path = folder / name / "vae.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = bank()
        write_tensors(path, vae_shapes(name, model_config(name).out_dim), lambda key, out: fill_vae(key, out, numbers))
    return path


def write_text_encoder(folder: Path, text_dim: int) -> Path:
    """umT5 with a small tokenizer of its own in one file, as ComfyUI has it: 11 GB with 4096 channels."""
    from wan_pack.demo.tiny_model import train_tokenizer
    from wan_pack.wan.text.t5_keys import module_names

    layers, heads, head_dim, ffn_dim, vocabulary = TEXT_SHAPES[text_dim]
    wide = (heads * head_dim, text_dim)
    sizes = {
        "shared": (vocabulary, text_dim), "wi_0": (ffn_dim, text_dim), "wi_1": (ffn_dim, text_dim),
        "wo": (text_dim, ffn_dim), "o": wide[::-1], "relative_attention_bias": (32, heads),
    }  # fmt: skip
    modules = [(name, name.rpartition(".")[2]) for name in module_names(layers).values()]
    shapes = {f"{name}.weight": (text_dim,) if "norm" in leaf else sizes.get(leaf, wide) for name, leaf in modules}
    path = folder / f"umt5-{text_dim}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        numbers = bank()
        extra = {"spiece_model": train_tokenizer()}
        write_tensors(path, shapes, lambda key, out: fill_transformer(key, out, numbers), extra)
    return path


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], fill: Fill, extra: Mapping[str, bytes] | None = None
) -> None:
    """A safetensors file of bf16 tensors, filled in place: `save_file` would copy it first, one thread at a time.

    Args:
        extra: more tensors, of bytes.
    """
    import torch

    header: dict[str, Any] = {}
    size = 0
    for name, kind, shape, length in [
        *((name, "BF16", list(shape), 2 * math.prod(shape)) for name, shape in shapes.items()),
        *((name, "U8", [len(data)], len(data)) for name, data in (extra or {}).items()),
    ]:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    whole = torch.from_file(str(draft), shared=True, size=8 + len(text) + size, dtype=torch.uint8)
    data = whole[8 + len(text) :]
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if name in shapes:
            fill(name, data[first:last].view(torch.bfloat16).view(shapes[name]))
        else:
            data[first:last] = torch.frombuffer(bytearray((extra or {})[name]), dtype=torch.uint8)
    os.replace(draft, path)


def bank() -> Tensor:
    """[BANK], normally distributed, bf16: the same in every call."""
    import torch

    return torch.randn(BANK, generator=torch.Generator().manual_seed(0)).bfloat16()


def fill_random(name: str, out: Tensor, std: float, numbers: Tensor) -> None:
    """out: contiguous. From a place in the bank that the name decides."""
    import torch

    flat = out.view(-1)
    at, done = int(hashlib.sha1(name.encode()).hexdigest(), 16) % BANK, 0
    while done < len(flat):
        piece = numbers[at : at + len(flat) - done]
        torch.mul(piece, std, out=flat[done : done + len(piece)])
        done, at = done + len(piece), 0


def fill_transformer(name: str, out: Tensor, numbers: Tensor) -> None:
    """The statistics of an initialised network, but for the head; `out` as `fill_random`."""
    if name.endswith("weight") and out.dim() > 1:
        fill_random(name, out, HEAD_STD if name == "head.head.weight" else WEIGHT_STD, numbers)
    else:
        # A weight of one axis is a norm's, whatever it is called (`img_emb.proj.0`): of zeros nothing would pass.
        out.fill_(float(name.endswith("weight")))


def vae_shapes(name: str, z_dim: int) -> dict[str, tuple[int, ...]]:
    """Under diffusers' names, of the VAE with so many latent channels; narrow for a tiny model."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    tiny, residual = name.startswith("tiny"), z_dim == 48
    sizes: dict[str, Any] = {"base_dim": 8 if tiny else 160 if residual else 96, "z_dim": z_dim}
    if residual:
        sizes |= {
            "decoder_base_dim": 8 if tiny else 256, "is_residual": True, "in_channels": 12, "out_channels": 12,
            "patch_size": 2, "scale_factor_spatial": 16,
        }  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKLWan(**sizes)
    return {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}


def fill_vae(name: str, out: Tensor, numbers: Tensor) -> None:
    """Norms of one; an encoder of random kernels; a decoder that mixes channels at random and blurs."""
    import torch

    if out.dim() < 4 or name.endswith(("gamma", "bias")):
        out.fill_(float(name.endswith("gamma")))
    elif not name.startswith("decoder."):
        fill_random(name, out, out[0].numel() ** -0.5, numbers)
    elif "time_conv" in name:
        # Of the two frames that one becomes, the first is half the frame before: what moves goes on moving evenly.
        channels = torch.eye(out.shape[1])
        out.zero_()
        out[: len(channels), :, 1, 0, 0] = out[: len(channels), :, 2, 0, 0] = channels / 2
        out[len(channels) :, :, 2, 0, 0] = channels
    else:
        mixed = torch.empty(out.shape[:2], dtype=out.dtype)
        fill_random(name, mixed, out.shape[1] ** -0.5, numbers)
        if "conv_out" in name:
            # Pixels that come out of one position, by fours, have the same colour.
            mixed = mixed[:3].repeat_interleave(len(out) // 3, 0) / 2
        out.copy_(mixed.view(*mixed.shape, *[1] * (out.dim() - 2)) * _blur(out.shape[2:]))


def _blur(size: torch.Size) -> Tensor:
    """A kernel of this size whose sum is 1; in time the last frame counts most."""
    import torch

    kernel = torch.ones(1)
    for axis, length in enumerate(size):
        causal = len(size) == 3 and axis == 0
        line = torch.tensor([1.0] if length == 1 else [0.0, 0.25, 0.75] if causal else [0.25, 0.5, 0.25])
        kernel = kernel[..., None] * line
    return kernel[0]


def _digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return hashlib.sha1(json.dumps(shapes).encode()).hexdigest()[:16]


def _link_expert(target: Path, files: Mapping[Path, Mapping[str, Any]], config: WanConfig) -> None:
    if (target / "config.json").exists():
        return
    target.mkdir(exist_ok=True)
    weight_map = {}
    for number, (file, shapes) in enumerate(files.items(), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-{len(files):05}.safetensors"
        (target / name).unlink(missing_ok=True)
        (target / name).hardlink_to(file)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    # Last: with it the expert is whole.
    told: dict[str, Any] = {"_class_name": "WanModel", "num_heads": config.num_heads}
    if config.vace_layers:
        told |= {"_class_name": "VaceWanModel", "vace_layers": list(config.vace_layers)}
    (target / "config.json").write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=THREADS, help="that write at a time")
    parser.add_argument("--text", action="store_true", help="umT5 as well")
    parser.add_argument("models", nargs="+", help="names in wan/model/config.py, or tiny, tiny-i2v, ...")
    arguments = parser.parse_args()
    mount_pack()
    start = time.perf_counter()
    for name in arguments.models:
        write_model(arguments.folder, name, arguments.threads)
        if arguments.text:
            write_text_encoder(arguments.folder, model_config(name).text_dim)
        print(f"{name}: there after {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
