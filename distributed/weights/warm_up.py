"""What a step uses for the first time, used while its weights arrive.

The first call of a kernel brings its code onto the GPU, libraries make their workspaces, ranks open each other's
memory. The first step would wait for all of it, and while weights are read a GPU has nothing else to do.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ...wan.model.attention_kernels import AttentionKernel
from ...wan.model.config import PICTURE_ROWS, TEXT_LEN
from ...wan.transformer.conditions import Beside
from ...wan.transformer.context import Context
from ...wan.transformer.transformer import WanModel
from ...wan.transformer.vace import Control
from ..job.job import Parallel
from ..job.progress import Span
from ..libraries.library_imports import import_diffusers
from ..parallel.mesh import Mesh
from ..parallel.passes import Pass, evaluate_passes
from ..parallel.sequence import SequenceShard
from .prefetch import Prefetch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BesideReading:
    """What goes on while a model's weights are read."""

    use: Callable[[WanModel], None] = lambda model: None
    """Given that model."""
    span: Span = nullcontext
    """Measures what it is named."""


NOTHING_BESIDE = BesideReading()


def get_ready(
    model: WanModel, parallel: Parallel, shard: SequenceShard | None, *, mesh: Mesh | None, device: torch.device,
    kernel: AttentionKernel | None, span: Span,
) -> None:  # fmt: skip
    """While the weights of `model` are read: what is imported and used for the first time later. Collective.

    Args:
        shard: this rank's tokens; None: they are not known yet.
        kernel: of self-attention; None: one that looks at what it computes.
    """
    if device.type != "cuda":
        # With one core per rank both would only wait for each other.
        return

    def imports() -> None:
        with span("import of diffusers"):
            import_diffusers()

    moves = parallel.stream_blocks or (parallel.use_fsdp and mesh is not None)
    if shard is None or kernel is None or moves:
        # Blocks come and go with their weights.
        imports()
        return
    if kernel.module:
        with span("import of attention"):
            importlib.import_module(kernel.module)

    def use() -> None:
        with kernel.activate():
            first_evaluation(model, shard, mesh, device)

    use_beside(imports, use, device=device, alone=mesh is None, compiles=parallel.torch_compile, span=span)


@torch.no_grad()
def first_evaluation(model: WanModel, shard: SequenceShard, mesh: Mesh | None, device: torch.device) -> None:
    """An evaluation of zeros by the model's first block alone, in a step's own shapes. Collective.

    What comes out is thrown away: the weights may be anything yet, and are only read. It takes the memory that a step
    takes.

    Args:
        model: whose blocks hold their weights whole: not sharded, and not streamed.
    """
    config, size = model.config, shard.size

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=device)

    beside = Beside(
        picture=Context(zeros(PICTURE_ROWS, config.clip_dim), keep=False) if config.image_branch else None,
        controls=(Control(zeros(size, 4 * config.control_dim)),) if config.vace_layers else (),
    )
    asked = Pass(
        zeros(size, 4 * config.in_dim), zeros(1), Context(zeros(TEXT_LEN, config.text_dim), keep=False), None, beside
    )
    rope = zeros(size, config.head_dim // 2), zeros(size, config.head_dim // 2)
    evaluate_passes(of_first_block(model), [asked] * (1 if mesh is None else mesh.cfg_size), rope, mesh)
    if device.type == "cuda":
        # On the stream that steps run on, before anything else may want the exchange.
        torch.cuda.current_stream(device).synchronize()


def of_first_block(model: WanModel) -> WanModel:
    """The same modules without the other blocks."""
    alone = copy.copy(model)
    alone._modules = {**model._modules, "blocks": model.blocks[:1]}
    first = tuple(layer for layer in model.config.vace_layers if layer == 0)
    alone.config = replace(model.config, num_layers=1, vace_layers=first)
    return alone


def use_beside(
    imports: Callable[[], None],
    use: Callable[[], None],
    *,
    device: torch.device,
    alone: bool,
    compiles: bool,
    span: Span = nullcontext,
) -> None:
    """Both at once: what Python imports on this thread, and what libraries load for `use` on another one.

    Args:
        alone: this rank is the only one. Then what goes wrong in `use` is left to the step that it was done for; of
            several, others may be waiting for this one in the midst of it.
        compiles: `use` imports the compiler, as may `imports`: one after the other.
        span: measures what it is named.
    """

    def used() -> None:
        if device.type == "cuda":
            # A thread starts on GPU 0.
            torch.cuda.set_device(device)
        try:
            with span("first use of kernels"):
                use()
        except Exception:
            if not alone:
                raise
            log.warning("kernels are used first in the first step:", exc_info=True)

    if compiles:
        imports()
        used()
        return
    using = Prefetch(lambda _: used())
    imports()
    wait_for_first_use(using)


def wait_for_first_use(using: Prefetch) -> None:
    """Which may wait for other ranks: so it is named in the stack of one that only does that."""
    using.wait(lambda done, total: None)
