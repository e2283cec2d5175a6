"""Sparse attention by Sol-Attn (arXiv 2607.24027): of keys that matter little to some queries a block counts as one."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention
from .attention_kernels import AttentionKernel

BLOCK = 64
"""Tokens of a block, as the kernel has them."""
LEAST_TOKENS = 12_288
"""Shorter sequences stay dense: they would not be faster."""
DENSE_SHARE = 0.2
"""Of the steps, the first ones, which lay a video out, stay dense: as ComfyUI's own does."""


def sol_attention(q: Tensor, k: Tensor, v: Tensor, *, tau: float) -> Tensor:
    """By the package comfy-kitchen. q: [S, H, 128]; k, v: [K, H, 128], K <= S -> [S, H, 128], zero from K on.

    Args:
        tau: a block of keys is attended exactly where its score is more than `tau` deviations over the mean.
    """
    from comfy_kitchen import sol_attn

    if q.shape[1] == 0:
        return q
    length = k.shape[0]
    out = sol_attn(q[None, :length], k[None], v[None], tau=tau)[0]
    # Queries past the keys are a sequence's padding.
    return out if length == q.shape[0] else F.pad(out, (0, 0, 0, 0, 0, q.shape[0] - length))


class SparseAttention:
    """An attention kernel that is sparse in some steps.

    Args:
        dense: a kernel for the same GPU.
        tau: of `sol_attention`.
    """

    def __init__(self, dense: Attention, tau: float) -> None:
        self._dense, self.tau = dense, tau
        self._on = False
        self.steps = range(0)
        """Which of a job's steps are sparse."""

    def enter(self, step: int) -> None:
        """What is evaluated from now on belongs to that step."""
        self._on = step in self.steps

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sol_attention(q, k, v, tau=self.tau) if self._on else self._dense(q, k, v)


def sparse_kernel(kernel: AttentionKernel, dense: AttentionKernel, tau: float) -> AttentionKernel:
    """The sparse `kernel` ready to run, with `dense` in the steps that are not."""
    run = SparseAttention(dense.run, tau)
    reason = f"{kernel.reason}; else {dense.name}"
    return dataclasses.replace(kernel, function=run, backends=dense.backends, reason=reason)


def sparse_steps(steps: range, of: int, tokens: int) -> range:
    """Which of `steps` are sparse in a schedule of `of` steps, for a video of that many tokens."""
    first = max(steps.start, math.ceil(of * DENSE_SHARE)) if tokens >= LEAST_TOKENS else steps.stop
    return range(min(first, steps.stop), steps.stop)


def block_order(grid: tuple[int, int, int]) -> Tensor:
    """The tokens of a grid in an order in which each `BLOCK` that follow one another are neighbours in space and time.

    Halves the grid across its longest side until only blocks are left; a cut may run through a row.

    Returns:
        [L] int64: the places of the tokens in the frame-major order (patch.patchify).
    """
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).view(-1, 3)
    waiting, blocks = [torch.arange(len(places))], []
    while waiting:
        tokens = waiting.pop()
        if len(tokens) <= BLOCK:
            blocks.append(tokens)
            continue
        inside = places[tokens]
        axis = int((inside.amax(0) - inside.amin(0)).argmax())
        tokens = tokens[inside[:, axis].argsort(stable=True)]
        # Whole blocks first: the one that may be shorter is the very last.
        half = -(-len(tokens) // BLOCK) // 2 * BLOCK
        waiting += [tokens[half:], tokens[:half]]
    return torch.cat(blocks)
