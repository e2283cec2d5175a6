"""The prompts: text for the job to encode, or embeddings as other nodes hand them on -> the tensors that a job takes.

Two forms come in. WANVIDEOTEXTEMBEDS: a dict whose `prompt_embeds` and `negative_prompt_embeds` are a list of
[n, dim] tensors, one per prompt segment, or one tensor. Core CONDITIONING: a list of [tensor [1, n, dim], dict].
Both pad with zeros, which the model does itself, so they are trimmed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...distributed.job.errors import listed
from ...distributed.job.job import ModelFiles, Sampling, Text
from ...wan.model.config import TEXT_LEN
from ...wan.sampling.told import KINDS
from ..host.declared import kind_of
from ..host.entry_keys import PICTURE, PICTURE_MASK, PICTURE_MASK_INDEX, REFERENCES, SEEN, VACE_KEYS
from ..host.status import Status
from ..host.tensors import tensor_of
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

NOTES = "wan_distributed_notes"
"""Of WANVIDEOTEXTEMBEDS that WanVideo TextEncode made: lines for the status of the job."""
FOLLOWED = frozenset(
    {
        *("pooled_output", PICTURE, PICTURE_MASK, PICTURE_MASK_INDEX, SEEN, REFERENCES, *VACE_KEYS),
        *(kind.entry for kind in KINDS.values() if kind.entry),
    }
)
"""Of a CONDITIONING's dict: what other files of this room read."""
CHANGING = frozenset(
    {
        *("area", "mask", "mask_strength", "set_area_to_bounds", "control", "control_apply_to_uncond", "hooks"),
        *("gligen", "reference_motion", "reference_audio_embeds", "control_video", "model_conds"),
        *("audio_embed", "audio_embed_scale"),
        *("time_dim_concat", "unclip_conditioning", "track_path"),
        *("lora_strengths", "timestep_start", "timestep_end", "noise_mask"),
    }
)
"""Of a CONDITIONING's dict: what asks ComfyUI for another video, by another model or in part; it is refused. Other keys
have no effect on the models that run here: they are said, not followed."""
NEUTRAL = {
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "clip_start_percent": 0.0,
    "clip_end_percent": 1.0,
}
"""Of a CONDITIONING's dict: the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt's embedding."""

    tokens: Tensor
    """[n, dim], 1 <= n <= 512, on the CPU."""
    notes: tuple[str, ...]
    """What the user should know about how it was read."""


def text_inputs(
    asked: VideoInputs, model: ModelFiles, sampling: Sampling, status: Status
) -> tuple[Text | None, dict[str, Tensor]]:
    """The prompts to encode inside the job; or None and the tensors to send with it: context, context_null."""
    from ...distributed.planning.preflight import needs_negative

    text_embeds, negative_embeds = asked.text_embeds, asked.negative_embeds
    prompt, negative_prompt = asked.prompt, asked.negative_prompt
    if text_embeds is None:
        if negative_embeds is not None:
            raise ValueError("negative_embeds is connected but text_embeds is not; connect both or neither")
        if not prompt.strip():
            raise ValueError("prompt is empty and text_embeds is not connected: there is nothing to make a video of")
        if not model.text_encoder:
            raise ValueError(
                "text_embeds is not connected and the model has no text encoder: connect WanVideo TextEncode "
                "(or CLIP Text Encode) to text_embeds, or choose a text_encoder in Load Wan Video Model"
            )
        return Text(prompt=prompt, negative_prompt=negative_prompt), {}
    unused = [name for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)) if value.strip()]
    if unused:
        status.warn(f"text_embeds is connected: {' and '.join(unused)} of this node had no effect")
    found = {"context": prompt_of(text_embeds, "text_embeds")}
    if needs_negative(model, sampling):
        if negative_embeds is not None:
            found["context_null"] = prompt_of(negative_embeds, "negative_embeds")
        elif (null := negative_of(text_embeds, "text_embeds")) is not None:
            found["context_null"] = null
    for embedding in found.values():
        status.warn(*embedding.notes)
    return None, {name: embedding.tokens for name, embedding in found.items()}


def prompt_of(value: Any, name: str) -> Embedding:
    """The prompt that the input `name` carries. Raises ValueError in the user's words if it is not one prompt."""
    if isinstance(value, dict):
        ignored = tuple(
            f"{name}: {key} is not used by this node" for key in ("nag_prompt_embeds",) if value.get(key) is not None
        )
        notes = value.get(NOTES)
        ignored += tuple(f"{name}: {listed([note])}" for note in (notes if isinstance(notes, list) else ()))
        return _one(value.get("prompt_embeds"), name, ignored)
    return _from_conditioning(value, name)


def negative_of(value: Any, name: str) -> Embedding | None:
    """The negative prompt that a text_embeds input carries, if it does."""
    if not isinstance(value, dict) or value.get("negative_prompt_embeds") is None:
        return None
    return _one(value["negative_prompt_embeds"], f"the negative prompt of {name}", ())


def conditioning_entry(value: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """The first entry of a CONDITIONING: its prompt's embedding, and what it carries beside it."""
    entry = value[0] if isinstance(value, list) and value else None
    if not isinstance(entry, list | tuple) or len(entry) < 2 or not isinstance(entry[1], dict):
        raise ValueError(f"{name} is {kind_of(value)}; it must be WANVIDEOTEXTEMBEDS or CONDITIONING")
    return entry[0], entry[1]


def extras_of(value: Any, name: str) -> dict[str, Any]:
    """What the first entry of a CONDITIONING carries beside the prompt; nothing for other kinds of embeddings."""
    return {} if value is None or isinstance(value, dict) else conditioning_entry(value, name)[1]


def _from_conditioning(value: Any, name: str) -> Embedding:
    tokens, extras = conditioning_entry(value, name)
    notes = []
    if len(value) > 1:
        notes.append(f"{name} has {len(value)} conditioning entries; the first one is used")
    notes += _read_extras(extras, name)
    return _one(tokens, name, tuple(notes))


def _read_extras(extras: dict[str, Any], name: str) -> list[str]:
    """Notes on what a conditioning carries beside the prompt. Raises ValueError for what would change the video."""
    carried = {key for key, extra in extras.items() if extra is not None} - FOLLOWED
    carried -= {
        key
        for key, value in NEUTRAL.items()
        if key in carried and isinstance(extras[key], int | float) and extras[key] == value
    }
    unsupported = sorted((carried & CHANGING) | (carried & NEUTRAL.keys()), key=str)
    if unsupported:
        raise ValueError(
            f"{name} carries {listed(unsupported)}, which this node does not support; "
            "take out the nodes between the text encoder and this node that add it"
        )
    return [f"{name} carries {listed(sorted(carried, key=str))}, which has no effect here"] if carried else []


def _one(value: Any, name: str, notes: tuple[str, ...]) -> Embedding:
    if value is None:
        raise ValueError(f"{name} holds no prompt embedding")
    # A list of [n, dim], one tensor [segments, n, dim], or one tensor [n, dim].
    allowed = "embeddings [tokens, dim], or a list of one such tensor"
    if isinstance(value, list | tuple):
        segments = list(value)
    else:
        tensor = tensor_of(value, name, allowed)
        segments = list(tensor) if tensor.ndim == 3 else [tensor]
    if len(segments) != 1:
        raise ValueError(
            f'{name} holds {len(segments)} prompts; this node takes one. A "|" in a prompt splits it: take it out'
        )
    tokens = tensor_of(segments[0], name, allowed)
    if tokens.ndim != 2 or tokens.shape[0] == 0:
        raise ValueError(f"{name} has the shape {list(tokens.shape)}; it must be [tokens, dim]")
    used = tokens.ne(0).any(dim=1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    if length > TEXT_LEN:
        notes = (*notes, f"{name} has {length} tokens; it was cut to {TEXT_LEN}, which is what the model takes")
    return Embedding(tokens[: min(length, TEXT_LEN)].contiguous(), notes)
