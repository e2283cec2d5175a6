"""Ulysses attention whose exchange is hidden: every rank writes into the others' memory while it computes.

Shapes: as in ulysses.py. v and q are on their way while k is projected. A rank's heads are attended in parts: what the
next one needs arrives, and what the last one results in is sent, while one is attended.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...wan.model.linear import LinearInput
from ...wan.model.ops import Ops, Rope
from ...wan.transformer.self_attention import SelfAttention
from .memory_layout import MemoryLayout
from .opened_memory import close_memory, peer_memory
from .sequence import SequenceShard, split_evenly
from .ulysses import PackedUlysses, write_projections

_layouts: dict[str, tuple[tuple[object, ...], MemoryLayout | None]] = {}
"""By name of the group: what is laid out, or that nothing can be. Models take turns: none may hold on to memory that
another one has let go for more."""


def _layout(
    group: dist.ProcessGroup, device: torch.device, shard: SequenceShard, heads: list[int], channels: int,
    dtypes: list[torch.dtype],
) -> MemoryLayout | None:  # fmt: skip
    """Collective where it is another one than the last of this group, alike on all ranks."""
    name, what = group.group_name, (shard.length, shard.rank, shard.world, *heads, channels, *dtypes)
    if name not in _layouts or _layouts[name][0] != what:
        # The one before lets its memory go first.
        _layouts.pop(name, None)
        memory = peer_memory(group, MemoryLayout.nbytes(shard, heads, channels, dtypes), device)
        made = None if memory is None else MemoryLayout(memory, shard, heads, channels, dtypes)
        _layouts[name] = what, made
    return _layouts[name][1]


def let_go(group: dist.ProcessGroup, device: torch.device) -> None:
    """Frees what `group` exchanges through, until it does so again. Collective."""
    _layouts.pop(group.group_name, None)
    close_memory(group, device)


class SymmetricUlysses(PackedUlysses):
    """Where the ranks cannot write to each other's memory, not even through the host's, it is what it inherits."""

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        heads = split_evenly(layer.num_heads, self.shard.world)
        asked = self.shard, heads, layer.head_dim, self._dtypes(layer)
        layout = _layout(self._group, layer.norm_q.weight.device, *asked)
        if layout is None:
            return super().__call__(layer, x, rope, ops)
        return self._hidden(layout, layer, x, rope, ops)

    def _hidden(self, layout: MemoryLayout, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        q, k, v = layout.sent

        def on_their_way(which: int) -> None:
            # What is behind the first part of q has time until that of k is on its way.
            for part in layout.parts if which == 2 else layout.parts[:1]:
                layout.send(layout.sent[which].copies[part])

        scales = write_projections(layer, x, rope, ops, layout.sent, written=on_their_way)
        arrivals = [layout.arrival(*((v, part) for part in layout.parts), (q, 0), (k, 0))]
        for part in layout.parts[1:]:
            for sent in (q, k):
                layout.send(sent.copies[part])
            arrivals.append(layout.arrival((q, part), (k, part)))
        results, first = [], layout.first_head
        for part, arrival in zip(layout.parts, arrivals, strict=True):
            layout.wait(arrival)
            queries, keys, values = layout.received(part)
            heads = slice(first, first + queries.shape[1])
            y = self._attend(queries, keys, values, scales, heads, ops).contiguous()
            first = heads.stop
            layout.send(layout.outgoing(part, y))
            results.append(y)
        layout.wait_for_returned()
        return layout.joined(results)
