"""Which tokens of the sequence a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceShard:
    """Rank `rank`'s run of a sequence of `length` tokens over `world` ranks.

    Every rank holds the same number: zero tokens are added at the global end. They are never attended to and are cut
    off in `gather`.
    """

    length: int
    """Tokens of the video."""
    rank: int = 0
    world: int = 1
    order: Tensor | None = field(default=None, compare=False)
    """[length] int64: which token of the video is where in the sequence; None: they follow each other."""

    @property
    def size(self) -> int:
        """Tokens per rank, padding included."""
        return -(-self.length // self.world)

    @property
    def start(self) -> int:
        return self.rank * self.size

    @property
    def stop(self) -> int:
        return self.start + self.size

    def split(self, tokens: Tensor) -> Tensor:
        """[length, C] -> this rank's [size, C]."""
        mine = slice(self.start, self.stop)
        local = tokens[mine if self.order is None else self.order[mine].to(tokens.device)]
        return F.pad(local, (0, 0, 0, self.size - local.shape[0]))

    def gather(self, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """[size, C] on every rank of `group` -> the whole [length, C] on every rank, in the video's order."""
        whole = local
        if self.world > 1:
            whole = local.new_empty(self.size * self.world, local.shape[1])
            dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
        if self.order is None:
            return whole[: self.length]
        return torch.empty_like(whole[: self.length]).index_copy_(0, self.order.to(whole.device), whole[: self.length])


def mean_size(local: Tensor, shard: SequenceShard, group: dist.ProcessGroup | None) -> float:
    """Mean of the elements' sizes over the whole sequence, the same bits on every rank of `group`.

    Args:
        local: this rank's [size, C].
        group: of all ranks, also those that hold the same tokens; None for one.
    """
    total = local[: max(0, shard.length - shard.start)].abs().sum(dtype=torch.float64)
    copies = 1
    if group is not None:
        dist.all_reduce(total, group=group)
        copies = group.size() // shard.world
    return total.item() / (shard.length * local.shape[1] * copies)


def split_evenly(total: int, parts: int) -> list[int]:
    """Sizes of `parts` runs of `total` items that differ by at most one; trailing ones may be 0."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def gather_bytes(value: bytes, device: torch.device) -> list[bytes]:
    """Gathers a short value of equal length from every rank, in rank order (the default group)."""
    mine = torch.tensor(list(value), dtype=torch.uint8, device=device)
    everyone = mine.new_empty(dist.get_world_size() * len(value))
    dist.all_gather_into_tensor(everyone, mine)
    return [bytes(part.tolist()) for part in everyone.cpu().view(-1, len(value))]


def everywhere(value: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether it is true on all ranks of `group`. Collective."""
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def gather_rows(mine: Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    """[n] integers of every rank of `group`, in rank order."""
    everyone = mine.new_empty(group.size() * len(mine))
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return everyone.view(-1, len(mine)).tolist()
