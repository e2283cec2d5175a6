"""Which rows of the picture a rank holds, and the collectives between such ranks.

Shapes: ... = any leading sizes, equal on all ranks; T = frames, W = width, C = channels. Rows are counted in the
coarsest resolution, the latent one: a rank that holds k of its rows holds 2k, 4k, ... of the finer ones.
Only `all_to_all_single` and `all_gather_into_tensor` are used, which every backend has; sizes are known beforehand, so
that nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .sequence import split_evenly


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageShard:
    """Rank `rank`'s run of the rows, next to those of the ranks before and after it."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    """Latent rows of every rank; at least one each."""

    @classmethod
    def of(cls, num_rows: int, group: dist.ProcessGroup) -> ImageShard:
        """This process's share of `num_rows` latent rows. Shares differ by at most one."""
        world = dist.get_world_size(group)
        assert num_rows >= world, f"{num_rows} rows for {world} ranks"
        return cls(group=group, rank=dist.get_rank(group), sizes=tuple(split_evenly(num_rows, world)))

    @property
    def world(self) -> int:
        return len(self.sizes)

    def split(self, whole: Tensor) -> Tensor:
        """[..., rows, W] -> this rank's rows, a view. The rows are a multiple of the latent ones."""
        scale = whole.shape[-2] // sum(self.sizes)
        return whole.narrow(-2, sum(self.sizes[: self.rank]) * scale, self.sizes[self.rank] * scale)

    def fill_halo(self, padded: Tensor, *, above: bool) -> None:
        """Puts the neighbours' adjacent rows into the last row of [T, rows, W, C] and, with `above`, into the first.

        At the picture's edges there is no neighbour, and zeros are put.
        """
        first, last = padded[:, int(above)], padded[:, -2]
        send, send_sizes, receive_sizes = [], [0] * self.world, [0] * self.world
        row = first.numel()
        # Both buffers are in the order of ranks: first what goes up or comes from there.
        if self.rank > 0:
            send.append(first)
            send_sizes[self.rank - 1] = row
            receive_sizes[self.rank - 1] = row * above
        if self.rank < self.world - 1:
            if above:
                send.append(last)
            send_sizes[self.rank + 1] = row * above
            receive_sizes[self.rank + 1] = row
        received = padded.new_empty(sum(receive_sizes))
        sent = torch.stack(send).view(-1) if send else padded.new_empty(0)
        dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.group)
        if above:
            self._put(padded[:, 0], received[:row] if self.rank > 0 else None)
        self._put(padded[:, -1], received[-row:] if self.rank < self.world - 1 else None)

    @staticmethod
    def _put(row: Tensor, received: Tensor | None) -> None:
        if received is None:
            row.zero_()
        else:
            row.copy_(received.view(row.shape))

    def gather(self, local: Tensor, dim: int = -2) -> Tensor:
        """This rank's rows, dimension `dim` -> all ranks' rows, on every rank."""
        dim %= local.dim()
        scale = local.shape[dim] // self.sizes[self.rank]
        # Equal shapes for the collective; what is added is cut off again.
        shape = [*local.shape]
        shape[dim] = max(self.sizes) * scale
        padded = local.new_empty(shape)
        padded.narrow(dim, 0, local.shape[dim]).copy_(local)
        everyone = padded.new_empty(self.world * padded.numel())
        dist.all_gather_into_tensor(everyone, padded.view(-1), group=self.group)
        parts = everyone.view(self.world, *shape).unbind(0)
        return torch.cat([part.narrow(dim, 0, size * scale) for part, size in zip(parts, self.sizes, strict=True)], dim)

    def gather_to_first(self, local: Tensor) -> Tensor | None:
        """This rank's [..., rows, W] -> all ranks' rows on rank 0, None on the others."""
        latent_row = local.numel() // self.sizes[self.rank]
        receive_sizes = [latent_row * size if self.rank == 0 else 0 for size in self.sizes]
        send_sizes = [local.numel()] + [0] * (self.world - 1)
        received = local.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, local.flatten(), receive_sizes, send_sizes, group=self.group)
        if self.rank > 0:
            return None
        shape = (*local.shape[:-2], -1, local.shape[-1])
        return torch.cat([part.view(shape) for part in received.split(receive_sizes)], dim=-2)
