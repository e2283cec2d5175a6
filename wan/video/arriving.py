"""Frames on their way from the GPU to the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


class Arriving:
    """What nobody waits for before `there`: the GPU computes the next frames meanwhile."""

    def __init__(self, frames: Tensor) -> None:
        self._there = frames.to("cpu", non_blocking=True)
        self._arrived = None
        if frames.device.type == "cuda":
            # Behind this copy alone. A blocking one leaves the core to others.
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(frames.device))

    def there(self) -> Tensor:
        """On the CPU; waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._there
