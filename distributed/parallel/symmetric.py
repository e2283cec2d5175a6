"""Ulysses attention whose exchange is hidden: every rank writes into the others' memory while it computes.

Shapes: as in ulysses.py. v and q are on their way while k is projected. A rank's heads are attended in parts: what the
next one needs arrives, and what the last one results in is sent, while one is attended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Layouts:
    """What one memory of a group is used for."""

    of: tuple[object, ...]
    """Whose heads and tokens."""
    by_dtypes: dict[tuple[torch.dtype, ...], MemoryLayout | None] = field(default_factory=dict)
    """None: there is no memory for it."""


_layouts: dict[str, _Layouts] = {}
"""By name of the group. Models take turns: none may hold on to memory that another one has let go for more."""


def _layout(
    group: dist.ProcessGroup, device: torch.device, shard: SequenceShard, heads: list[int], channels: int,
    dtypes: list[torch.dtype],
) -> MemoryLayout | None:  # fmt: skip
    """Collective where it is another one than the last of this group, alike on all ranks."""
    name, of, kinds = group.group_name, (shard.length, *heads, channels), tuple(dtypes)
    if name not in _layouts or _layouts[name].of != of:
        # Those before let their memory go first.
        _layouts.pop(name, None)
        _layouts[name] = _Layouts(of)
    known = _layouts[name].by_dtypes
    if kinds not in known:
        needed = MemoryLayout.nbytes(shard, heads, channels, dtypes)
        if any(layout is not None and not layout.leaves(needed) for layout in known.values()):
            known.clear()
        memory = peer_memory(group, needed, device)
        known[kinds] = None if memory is None else MemoryLayout(memory, shard, heads, channels, dtypes)
    return known[kinds]


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
