"""Text embeddings as other nodes hand them on -> the two tensors that a job takes.

Two forms come in. WANVIDEOTEXTEMBEDS: a dict whose `prompt_embeds` and `negative_prompt_embeds` are a list of
[n, dim] tensors, one per prompt segment, or one tensor. Core CONDITIONING: a list of [tensor [1, n, dim], dict].
Both pad with zero rows, which the model does itself, so they are trimmed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..wan.config import TEXT_LEN

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt's embedding."""

    tokens: Tensor
    """[n, dim], 1 <= n <= 512, on the CPU."""
    notes: tuple[str, ...]
    """What the user should know about how it was read."""


def prompt_of(value: Any, name: str) -> Embedding:
    """The prompt that the input `name` carries. Raises ValueError in the user's words if it is not one prompt."""
    if isinstance(value, dict):
        ignored = tuple(
            f"{name}: {key} is not used by this node" for key in ("nag_prompt_embeds",) if value.get(key) is not None
        )
        return _one(value.get("prompt_embeds"), name, ignored)
    return _from_conditioning(value, name)


def negative_of(value: Any, name: str) -> Embedding | None:
    """The negative prompt that a text_embeds input carries, if it does."""
    if not isinstance(value, dict) or value.get("negative_prompt_embeds") is None:
        return None
    return _one(value["negative_prompt_embeds"], f"the negative prompt of {name}", ())


def _from_conditioning(value: Any, name: str) -> Embedding:
    if not isinstance(value, list) or not value or not isinstance(value[0], list | tuple) or len(value[0]) < 2:
        raise ValueError(f"{name} is {type(value).__name__}; it must be WANVIDEOTEXTEMBEDS or CONDITIONING")
    notes = []
    if len(value) > 1:
        notes.append(f"{name} has {len(value)} conditioning entries; the first one is used")
    tokens, extras = value[0][0], value[0][1]
    ignored = sorted(key for key, extra in extras.items() if key != "pooled_output" and extra is not None)
    if ignored:
        notes.append(f"{name} carries {', '.join(ignored)}, which text to video does not use")
    return _one(tokens, name, tuple(notes))


def _one(value: Any, name: str, notes: tuple[str, ...]) -> Embedding:
    if value is None:
        raise ValueError(f"{name} holds no prompt embedding")
    # A list of [n, dim], one tensor [segments, n, dim], or one tensor [n, dim].
    segments = [value] if getattr(value, "ndim", None) == 2 else list(value)
    if len(segments) != 1:
        raise ValueError(
            f'{name} holds {len(segments)} prompts; this node takes one. A "|" in a prompt splits it: take it out'
        )
    tokens = segments[0].detach().cpu()
    if tokens.ndim != 2 or tokens.shape[0] == 0:
        raise ValueError(f"{name} has the shape {list(tokens.shape)}; it must be [tokens, dim]")
    used = tokens.ne(0).any(dim=1).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    if length > TEXT_LEN:
        notes = (*notes, f"{name} has {length} tokens; it was cut to {TEXT_LEN}, which is what the model takes")
    return Embedding(tokens[: min(length, TEXT_LEN)].contiguous(), notes)
