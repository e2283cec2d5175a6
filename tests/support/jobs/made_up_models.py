"""A rank's cache of models that are made up: nothing is read, and of their weights only the size counts."""

from __future__ import annotations

import dataclasses

import torch
from wan_pack.distributed.job.job import FileIdentity
from wan_pack.distributed.job.model_files import ExpertFiles
from wan_pack.distributed.rank.experts import ExpertCache
from wan_pack.wan.model.attention import attention

SIZE = 10


@dataclasses.dataclass
class Weights:
    """Of a model of `SIZE` bytes."""

    resident_bytes: int = SIZE
    dropped: bool = False

    def park(self) -> None:
        self.resident_bytes = 0

    def drop(self) -> None:
        self.resident_bytes, self.dropped = 0, True


def files(name: str) -> tuple[FileIdentity, ...]:
    return (FileIdentity(path=f"/models/{name}.safetensors", size=1, mtime_ns=1),)


def cache_of_three() -> ExpertCache:
    """Of the models a, b and c, the first used longest ago."""
    cache = ExpertCache(0, torch.device("cpu"), attention, "plain")
    for name in ("a", "b", "c"):
        assert cache.named(files(name)) == name
        cache.models[name] = torch.nn.Module()  # type: ignore[assignment]
        cache.weights[name] = Weights()  # type: ignore[assignment]
        cache._made_of[name] = ExpertFiles(files(name), (), None)
    return cache
