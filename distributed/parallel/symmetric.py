"""Ulysses attention whose exchange is hidden: every rank writes into the others' memory while it computes.

Shapes: as in ulysses.py. v and q are on their way while k is projected. A rank's heads are attended in parts, and what
one part results in is sent while the next one is attended. What is sent beside other work is copied by the copy
engines, which take no multiprocessor from it: NCCL takes some, and so gains nothing by running beside products.
GPUs without peer access send through the host's memory, which takes as long as the attention: there q, k and v go part
by part, so that only the first part is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from ...wan.model.attention import Attention
from ...wan.model.linear import LinearInput
from ...wan.model.ops import Ops, Rope
from ...wan.transformer.self_attention import SelfAttention
from .memory_layout import LAST, MemoryLayout
from .peer_memory import peer_memory
from .sequence import SequenceShard, split_evenly
from .ulysses import PackedUlysses, write_projections

FIRST = 0
"""Heads of the first part: the attention waits for its keys."""
DIRECT = ("k",)
"""What the rotating kernel writes to the other ranks itself: the last that is projected has nothing to hide behind."""


class SymmetricUlysses(PackedUlysses):
    """Where the ranks cannot write to each other's memory it is what it inherits.

    Args:
        first, last: heads of those parts.
        direct: of q, k and v what is written to the other ranks at once, not copied.
    """

    def __init__(
        self, group: dist.ProcessGroup, shard: SequenceShard, attention: Attention,
        *, first: int = FIRST, last: int = LAST, direct: Sequence[str] = DIRECT,
    ) -> None:  # fmt: skip
        super().__init__(group, shard, attention)
        self._make_layout = partial(MemoryLayout, first=first, last=last, direct=frozenset(direct))
        self._layout: MemoryLayout | None = None
        self._able = True

    def __call__(self, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        if self._able and (self._layout is None or self._layout.shard != self.shard):
            self._layout = None
            self._layout = self._lay_out(layer)
            self._able = self._layout is not None
        if self._layout is None:
            return super().__call__(layer, x, rope, ops)
        return self._hidden(self._layout, layer, x, rope, ops)

    def _lay_out(self, layer: SelfAttention) -> MemoryLayout | None:
        heads = split_evenly(layer.num_heads, self.shard.world)
        what = self.shard, heads, layer.head_dim, self._dtypes(layer)
        memory = peer_memory(self._group, MemoryLayout.nbytes(*what), layer.norm_q.weight.device)
        return None if memory is None else self._make_layout(memory, *what)

    def _hidden(self, layout: MemoryLayout, layer: SelfAttention, x: LinearInput, rope: Rope, ops: Ops) -> Tensor:
        q, k, v = layout.sent

        def on_their_way(which: int) -> None:
            # What is behind the first run of q has time until that of k is on its way.
            for run in range(len(v.copies) if which == 2 else 1):
                layout.send(layout.sent[which].copies[run])

        scales = write_projections(layer, x, rope, ops, layout.sent, written=on_their_way)
        arrivals = [layout.arrival([*layout.incoming(v), *layout.incoming(q, 0), *layout.incoming(k, 0)])]
        for run in range(1, len(k.copies)):
            behind = [sent for sent in (q, k) if run < len(sent.copies)]
            for sent in behind:
                layout.send(sent.copies[run])
            arrivals.append(layout.arrival([piece for sent in behind for piece in layout.incoming(sent, run)]))
        results, first = [], layout.first_head
        for part, (queries, keys, values) in enumerate(layout.received()):
            layout.wait(arrivals[min(part, len(arrivals) - 1)])
            heads = slice(first, first + queries.shape[1])
            y = self._attend(queries, keys, values, scales, heads, ops).contiguous()
            first = heads.stop
            layout.send(layout.outgoing(part, y))
            results.append(y)
        layout.wait(layout.arrival(layout.returning()))
        return layout.joined(results)
