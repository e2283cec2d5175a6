"""A Wan2.2 T2V model in small: two experts, VAE, umT5 with its own tokenizer. Random weights, real file formats.

It has the structure and tensor names of the released files and is about 13 MB, so that the whole path from the node
to the mp4 runs on a CPU in seconds. It knows no pictures. So that the clip shows more than noise, the experts' first
block is set up to keep what neighbouring tokens have in common, and the VAE's kernels to be smooth: coloured clouds.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..wan.t5_keys import hf_to_official
from ..wan.vae_keys import WAN21, diffusers_to_official
from .example import TinyModel

DIM = 256
"""Two heads of 128: without a config.json a head has 128 channels."""
FFN_DIM = 512
LAYERS = 2
LATENT_DIM = 16
TEXT_DIM = 64
FREQ_DIM = 256
VAE_BASE_DIM = 8
TEXT_LAYERS = 2
SHARPNESS = 1.7
"""Of the experts' blur: higher is narrower."""
GROWTH = 2.0

SENTENCES = (
    "A red fox walks through deep snow at sunrise, slow camera.",
    "Two cats in boxing gloves fight on a stage under bright lights.",
    "Waves break on a black beach while seagulls circle above the cliffs.",
    "An old man with a white beard reads a newspaper in a quiet cafe.",
    "Blue neon signs shine on a wet street, people walk with umbrellas.",
    "A paper boat drifts down a small river between green stones.",
    "Close view of a watchmaker's hands, warm light, shallow focus.",
    "The camera rises over a field of yellow flowers to the mountains.",
    "static, blurred, low quality, worst quality, ugly, subtitles, still picture",
)


def write_comfyui_files(models: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> TinyModel:
    """Writes ComfyUI's single files into the folders of `models`. One expert has ComfyUI's prefix, one has none."""
    from safetensors.torch import save_file

    names = TinyModel()
    spiece = torch.frombuffer(bytearray(train_tokenizer()), dtype=torch.uint8)
    files = {
        f"diffusion_models/{names.high_noise}": {
            f"model.diffusion_model.{name}": tensor.to(dtype) for name, tensor in expert(seed).items()
        },
        f"diffusion_models/{names.low_noise}": {name: tensor.to(dtype) for name, tensor in expert(seed + 1).items()},
        f"vae/{names.vae}": vae(seed + 2),
        f"text_encoders/{names.text_encoder}": {**text_encoder(seed + 3), "spiece_model": spiece},
    }
    for name, tensors in files.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, models / name)
    return names


def write_official_folder(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Writes the same model in the official layout: sharded experts, .pth VAE and text encoder, tokenizer folder."""
    for name, tensors in (("high_noise_model", expert(seed)), ("low_noise_model", expert(seed + 1))):
        _write_shards(folder / name, {key: tensor.to(dtype) for key, tensor in tensors.items()})
    torch.save(vae(seed + 2), folder / "Wan2.1_VAE.pth")
    official = {hf_to_official(name, TEXT_LAYERS): tensor for name, tensor in text_encoder(seed + 3).items()}
    torch.save(official, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "spiece.model").write_bytes(train_tokenizer())


def expert(seed: int) -> dict[str, Tensor]:
    """One transformer, official names."""
    make = _Weights(seed)
    for name, out_dim, in_dim in (
        ("text_embedding.0", DIM, TEXT_DIM),
        ("text_embedding.2", DIM, DIM),
        ("time_embedding.0", DIM, FREQ_DIM),
        ("time_embedding.2", DIM, DIM),
        ("time_projection.1", 6 * DIM, DIM),
    ):
        make.linear(name, out_dim, in_dim)
    make.linear("patch_embedding", DIM, LATENT_DIM, 1, 2, 2)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        make.normal(f"{block}.modulation", (1, 6, DIM), DIM**-0.5)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                make.linear(f"{block}.{attention}.{part}", DIM, DIM)
            for part in ("norm_q", "norm_k"):
                make.ones(f"{block}.{attention}.{part}.weight", DIM)
        make.ones(f"{block}.norm3.weight", DIM)
        make.normal(f"{block}.norm3.bias", (DIM,), 0.02)
        make.linear(f"{block}.ffn.0", FFN_DIM, DIM)
        make.linear(f"{block}.ffn.2", DIM, FFN_DIM)
    make.normal("head.modulation", (1, 2, DIM), DIM**-0.5)
    make.linear("head.head", 4 * LATENT_DIM, DIM)
    _keep_what_neighbours_share(make.tensors)
    return make.tensors


def _keep_what_neighbours_share(tensors: dict[str, Tensor]) -> None:
    """Makes the velocity about `x - GROWTH * blur(x)`: what is noise within a neighbourhood shrinks, the rest grows.

    Queries and keys that are constant leave only the rotary position in the attention: it becomes a blur.
    """
    embed = torch.linalg.qr(tensors["patch_embedding.weight"].reshape(DIM, 4 * LATENT_DIM)).Q
    tensors["patch_embedding.weight"] = 2 * embed.reshape(DIM, LATENT_DIM, 1, 2, 2).contiguous()
    # Behind the last norm the token's channels come in the order row, column, channel.
    out = embed.reshape(DIM, LATENT_DIM, 2, 2).permute(2, 3, 1, 0).reshape(4 * LATENT_DIM, DIM)
    tensors["head.head.weight"] = (out / 2).contiguous()
    for part in ("q", "k"):
        tensors[f"blocks.0.self_attn.{part}.weight"] *= 0.05
        tensors[f"blocks.0.self_attn.{part}.bias"] = torch.ones(DIM)
        tensors[f"blocks.0.self_attn.norm_{part}.weight"] *= SHARPNESS
    tensors["blocks.0.self_attn.v.weight"] = torch.eye(DIM)
    tensors["blocks.0.self_attn.o.weight"] = torch.eye(DIM)
    modulation = torch.tensor([0.0, 0.0, -GROWTH, 0.0, 0.0, 0.1])
    tensors["blocks.0.modulation"] = 0.1 * tensors["blocks.0.modulation"] + modulation[None, :, None]
    for layer in range(LAYERS):
        for name in ("cross_attn.o.weight", "ffn.2.weight"):
            tensors[f"blocks.{layer}.{name}"] *= 0.1
    tensors["time_projection.1.weight"] *= 0.05


def vae(seed: int) -> dict[str, Tensor]:
    """The Wan2.1 VAE, official names."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKLWan(base_dim=VAE_BASE_DIM, z_dim=LATENT_DIM)
    weights = {diffusers_to_official(name, WAN21): _smooth(tensor) for name, tensor in model.state_dict().items()}
    for name in (name for name in weights if name.startswith("decoder.") and "time_conv" in name):
        # One half of the channels makes the earlier, the other the later of two frames; alike, they do not flicker.
        early, late = weights[name].chunk(2)
        weights[name] = torch.cat([early, 0.8 * early + 0.2 * late])
    return weights


def _smooth(weight: Tensor) -> Tensor:
    """Gives every 3x3 kernel of a convolution the same smooth shape, at its own strength."""
    if weight.ndim < 4 or weight.shape[-2:] != (3, 3):
        return weight.contiguous()
    blur = torch.tensor([0.25, 0.5, 0.25])
    # The mean of nine random values is a third as large as one of them.
    strength = 3 * weight.mean((-2, -1), keepdim=True)
    return (9**0.5 * strength * torch.outer(blur, blur)).contiguous()


def text_encoder(seed: int) -> dict[str, Tensor]:
    """The umT5 encoder, transformers names."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=_vocabulary(train_tokenizer()),
        d_model=TEXT_DIM,
        d_kv=TEXT_DIM // 4,
        d_ff=2 * TEXT_DIM,
        num_layers=TEXT_LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }


def train_tokenizer() -> bytes:
    """A SentencePiece model with umT5's special tokens: <pad> 0, </s> 1, <unk> 2."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=writer,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return writer.getvalue()


def _vocabulary(spiece_model: bytes) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=spiece_model).vocab_size()


class _Weights:
    """Makes random tensors under their names, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def linear(self, name: str, out_dim: int, *in_dims: int) -> None:
        fan_in = torch.Size(in_dims).numel()
        self.normal(f"{name}.weight", (out_dim, *in_dims), fan_in**-0.5)
        self.normal(f"{name}.bias", (out_dim,), 0.02)

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> None:
        self.tensors[name] = torch.randn(shape, generator=self._generator) * std

    def ones(self, name: str, dim: int) -> None:
        self.tensors[name] = torch.ones(dim)


def _write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "_class_name": "WanModel",
        "dim": DIM,
        "ffn_dim": FFN_DIM,
        "freq_dim": FREQ_DIM,
        "in_dim": LATENT_DIM,
        "model_type": "t2v",
        "num_heads": DIM // 128,
        "num_layers": LAYERS,
        "out_dim": LATENT_DIM,
        "text_len": 512,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
