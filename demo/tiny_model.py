"""Wan2.2's models in small: experts, VAEs, umT5 with its own tokenizer, LoRAs. Random weights, real file formats.

They have the structure and tensor names of the released files and are a few MB each, so that the whole path from the
node to the mp4 runs on a CPU in seconds. They know no pictures.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..wan.model.latent_space import WAN22
from ..wan.text.t5_keys import module_names
from .example import TinyModel
from .official_names import under_official_names
from .tiny_expert import DIM, FFN_DIM, FREQ_DIM, LAYERS, TEXT_DIM, expert, lora
from .tiny_vae import vae

LATENT_DIM = 16
TEXT_LAYERS = 2

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
    """Writes T2V-A14B as ComfyUI's single files into the folders of `models`. One expert has ComfyUI's prefix."""
    names = TinyModel()
    spiece = torch.frombuffer(bytearray(train_tokenizer()), dtype=torch.uint8)
    _save(
        models,
        {
            f"diffusion_models/{names.high_noise}": {
                f"model.diffusion_model.{name}": tensor.to(dtype) for name, tensor in expert(seed).items()
            },
            f"diffusion_models/{names.low_noise}": _cast(expert(seed + 1), dtype),
            f"vae/{names.vae}": vae(seed + 2),
            f"text_encoders/{names.text_encoder}": {**text_encoder(seed + 3), "spiece_model": spiece},
        },
    )
    return names


def write_other_comfyui_files(models: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 10) -> None:
    """Writes what the other example workflows need beside it: I2V-A14B, TI2V-5B with its VAE, VACE, Fun-Control,
    Fun-Camera, and four-step LoRAs."""
    names = TinyModel()
    _save(
        models,
        {
            f"diffusion_models/{names.i2v_high_noise}": _cast(expert(seed, in_dim=36), dtype),
            f"diffusion_models/{names.i2v_low_noise}": _cast(expert(seed + 1, in_dim=36), dtype),
            f"diffusion_models/{names.ti2v}": _cast(expert(seed + 2, in_dim=48, out_dim=48), dtype),
            f"diffusion_models/{names.vace}": _cast(expert(seed + 6, parts=("vace_blocks",)), dtype),
            f"diffusion_models/{names.fun_control}": _cast(expert(seed + 7, in_dim=52, parts=("ref_conv",)), dtype),
            f"diffusion_models/{names.fun_camera}": _cast(
                expert(seed + 8, in_dim=36, parts=("control_adapter",)), dtype
            ),
            f"vae/{names.ti2v_vae}": vae(seed + 3, WAN22),
            f"loras/{names.high_noise_lora}": _cast(lora(seed + 4), dtype),
            f"loras/{names.low_noise_lora}": _cast(lora(seed + 5), dtype),
        },
    )


def write_animate_file(models: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 19) -> None:
    """Writes Animate's transformer: 86 MB, as what reads a face has one size only."""
    weights = _cast(expert(seed, in_dim=36, parts=("img_emb", "face_adapter")), dtype)
    _save(models, {f"diffusion_models/{TinyModel().animate}": weights})


def write_official_folder(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Writes the same model in the official layout: sharded experts, .pth VAE and text encoder, tokenizer folder."""
    for name, tensors in (("high_noise_model", expert(seed)), ("low_noise_model", expert(seed + 1))):
        _write_shards(folder / name, _cast(tensors, dtype))
    torch.save(vae(seed + 2), folder / "Wan2.1_VAE.pth")
    official = under_official_names(text_encoder(seed + 3), module_names(TEXT_LAYERS))
    torch.save(official, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "spiece.model").write_bytes(train_tokenizer())


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


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _save(models: Path, files: dict[str, dict[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    for name, tensors in files.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, models / name)


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
