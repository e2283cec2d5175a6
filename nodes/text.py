"""The text nodes, with the ids and sockets of ComfyUI-WanVideoWrapper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.job.errors import check_text
from ..distributed.job.job import MAX_PROMPT
from .host import host
from .host.declared import as_declared, kind_of
from .models import catalogue
from .sockets.embeds import NOTES

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class TextEncoderFiles:
    """A text encoder that has been chosen, not loaded: it lives only while it encodes."""

    encoder: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    """Empty when the encoder carries its tokenizer."""
    precision: str


class LoadWanVideoT5TextEncoder:
    DESCRIPTION = "Chooses the umT5-xxl text encoder of Wan2.2. It is loaded while prompts are encoded, then released."
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "load"
    RETURN_TYPES = ("WANTEXTENCODER",)
    RETURN_NAMES = ("wan_t5_model",)
    OUTPUT_TOOLTIPS = ("The text encoder, for WanVideo TextEncode.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "model_name": (
                    catalogue.text_encoder_names(),
                    {
                        "tooltip": "A umT5-xxl encoder in models/text_encoders, such as umt5_xxl_fp16.safetensors, "
                        "which carries its tokenizer."
                    },
                ),
                "precision": (
                    list(PRECISIONS),
                    {"default": "bf16", "tooltip": "Precision of the encoder while it runs."},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model_name: str | None, **_: Any) -> str:
        if model_name is None:
            return ""
        return catalogue.fingerprint(path for part in catalogue.text_encoder_files(model_name) for path in part)

    @as_declared
    def load(self, model_name: str, precision: str) -> tuple[TextEncoderFiles]:
        encoder, tokenizer = catalogue.text_encoder_files(model_name)
        return (TextEncoderFiles(encoder, tokenizer, precision),)


class WanVideoTextEncode:
    DESCRIPTION = (
        "Encodes a prompt and a negative prompt with umT5-xxl on ComfyUI's device, "
        "then releases the encoder so that the video job has the memory."
    )
    CATEGORY = "WanVideoDistributed"
    FUNCTION = "encode"
    RETURN_TYPES = ("WANVIDEOTEXTEMBEDS",)
    RETURN_NAMES = ("text_embeds",)
    OUTPUT_TOOLTIPS = ("Both prompts as embeddings, for the text_embeds input of Wan Video Distributed Inference.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "positive_prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "What the video shows. At most 512 tokens count."},
                ),
                "negative_prompt": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "What the video should not show. Empty: Wan's own negative prompt.",
                    },
                ),
            },
            "optional": {
                "t5": ("WANTEXTENCODER", {"tooltip": "From Load WanVideo T5 TextEncoder."}),
            },
        }

    @as_declared
    def encode(
        self, positive_prompt: str, negative_prompt: str, t5: TextEncoderFiles | None = None
    ) -> tuple[dict[str, Any]]:
        if not isinstance(t5, TextEncoderFiles):
            raise ValueError(f"t5 is {kind_of(t5)}; connect Load WanVideo T5 TextEncoder to it")
        for name, prompt in (("positive_prompt", positive_prompt), ("negative_prompt", negative_prompt)):
            check_text(name, prompt, MAX_PROMPT)
        if "|" in positive_prompt:
            # ComfyUI-WanVideoWrapper makes one segment of the video of each part; the inference node takes one.
            raise ValueError('positive_prompt has a "|", which splits it into segments of the video; take it out')
        import torch

        from ..wan.text.text_encoder import DEFAULT_NEGATIVE_PROMPT, load_text_encoder

        host.free_memory()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[t5.precision]
        encoder = None
        try:
            # Eleven gigabytes: a cancel does not wait for them.
            encoder = load_text_encoder(
                t5.encoder, t5.tokenizer, dtype=dtype, device=host.device(), check=_stop_if_cancelled
            )
            prompts = {
                "positive_prompt": positive_prompt,
                "negative_prompt": negative_prompt or DEFAULT_NEGATIVE_PROMPT,
            }
            positive, negative = encoder.encode(list(prompts.values()))
            notes = encoder.tokenizer.notes(**prompts)
        finally:
            del encoder
            host.free_memory()
        embeds = {"prompt_embeds": [positive.cpu()], "negative_prompt_embeds": [negative.cpu()], "echoshot": False}
        return ({**embeds, NOTES: notes},)


def _stop_if_cancelled() -> None:
    if host.interrupted():
        raise host.interruption()
