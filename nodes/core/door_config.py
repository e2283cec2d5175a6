"""The config of a loader for ComfyUI's own nodes: it may be left out, and is for this machine."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..host.declared import kind_of
from ..settings.spread import DistributedConfig

BETWEEN_NODES = 60
"""Seconds that the processes stay without a config: for the next node of the same workflow."""


def config_or_default(config: Any) -> DistributedConfig:
    """Of a node whose config may be left out. Raises ValueError if it is something else."""
    if config is None:
        return dataclasses.replace(DistributedConfig(), keep_warm_seconds=BETWEEN_NODES)
    if not isinstance(config, DistributedConfig):
        raise ValueError(f"config is {kind_of(config)}; connect Wan Video Distributed Config to it")
    return config


def check_one_machine(config: DistributedConfig, need: str) -> None:
    """Raises ValueError if it spreads the work over several machines.

    Args:
        need: what keeps it on this one, such as "a sampler of ComfyUI's needs".
    """
    if config.hosts:
        raise ValueError(
            f"hostfile is {config.hostfile}; {need} the GPUs of this machine. Take it out of the config, or use Wan "
            "Video Distributed Inference"
        )
