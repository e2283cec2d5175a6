"""What nodes put on a model that needs the inside of the transformer, whose blocks run in other processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...distributed.job.errors import listed
from ...wan.sampling.told import KINDS
from ..host.core_model import CoreSampling

_OPTIONS = {
    "patches_replace": "replaces blocks or their attention (skip layer guidance, perturbed attention and the like)",
    "patches": "patches the inside of blocks (such as NAG)",
    "optimized_attention_override": "replaces the attention kernel; the config node's attention chooses ours",
    "rope_options": "scales or shifts the rotary positions",
}
"""Of ComfyUI's transformer_options -> what the node that sets it does."""
_CONDS = {
    "control": "a control net",
    "hooks": "hooks (LoRAs by time or by prompt)",
    "time_dim_concat": "further frames beside the video's (Phantom's subjects)",
    "context_latents": "further latents that are looked at in context (Bernini's references)",
}
_SENT = frozenset(name for kind in KINDS.values() for name in (kind.cond, kind.strengths) if name)
"""Of what ComfyUI gives its transformer beside text: what goes to the processes."""
_PASSED_OVER = frozenset({"denoise_mask", "crossattn_controlnet", "y"})
"""What it passes over as well, in a model that has no part for it."""
_COMPILED = "torch.compile"
"""Key of the wrapper by which ComfyUI's TorchCompileModel has its transformer compiled."""
WHAT_TO_DO = (
    "it needs the inside of the transformer, which runs in other processes: take that node out, or load the model "
    "with Load Diffusion Model"
)


def check_sampling(sampling: CoreSampling) -> None:
    """Raises ValueError, naming it, if a node has put on the model or its conditioning what cannot be done."""
    check_options(sampling.options.get("transformer_options", {}))
    for reason in (*_of_conds(sampling), *_of_patcher(sampling)):
        raise ValueError(f"{reason}; {WHAT_TO_DO}")


def check_options(options: Mapping[str, Any]) -> None:
    """As `check_sampling`, of the transformer_options of one call: guidance may set them for its own calls."""
    for name, what in _OPTIONS.items():
        if options.get(name):
            raise ValueError(f"a node {what} ({name}); {WHAT_TO_DO}")


def check_parts(changed: Sequence[str]) -> None:
    """As `check_sampling`, of ComfyUI's transformer itself, which nodes may change past its patcher."""
    if changed:
        raise ValueError(f"a node changes what the transformer computes ({listed(changed[:5])}); {WHAT_TO_DO}")


def check_conds(conds: Mapping[str, Any]) -> None:
    """As `check_sampling`, of what ComfyUI would give its transformer."""
    for name in (name for name, value in conds.items() if value is not None and name not in _SENT | _PASSED_OVER):
        raise ValueError(f"the conditioning holds {_CONDS.get(name, 'what is not known here')} ({name}); {WHAT_TO_DO}")


def _of_conds(sampling: CoreSampling) -> Iterator[str]:
    for entries in sampling.conds.values():
        for entry in entries:
            for name, what in _CONDS.items():
                if entry.get(name) is not None:
                    yield f"the conditioning holds {what} ({name})"


def _of_patcher(sampling: CoreSampling) -> Iterator[str]:
    patcher = sampling.patcher
    if sum(map(len, patcher.patches.values())) != sum(len(one.patches) for one in sampling.added):
        yield "a node changes weights past ComfyUI's add_patches"
    if patcher.injections:
        yield f"a node injects modules into the model ({listed(patcher.injections)})"
    if patcher.weight_wrapper_patches:
        yield f"a node wraps weights ({listed(patcher.weight_wrapper_patches)})"
    if inside := [name for name in patcher.object_patches if name.startswith("diffusion_model")]:
        yield f"a node replaces a part of the transformer ({listed(inside)})"
    wrappers = patcher.wrappers.values()
    if any(kind.get(_COMPILED) for kind in wrappers):
        yield "a node compiles the transformer (torch_compile of Wan Video Distributed Config does so here)"
