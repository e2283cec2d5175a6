"""What the node tests feed in."""

from __future__ import annotations

from typing import Any

import torch
from wan_pack.nodes.inference import WanVideoDistributedInference


def rows(n: int, padding: int = 0, dim: int = 8) -> torch.Tensor:
    return torch.cat([torch.ones(n, dim), torch.zeros(padding, dim)])


def inputs_of(node: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    types = node.INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}


def settings(**values: Any) -> dict[str, Any]:
    """The node's inputs as ComfyUI passes them: defaults, then `values`."""
    defaults = {name: options["default"] for name, (_, options) in widgets().items()}
    return {**defaults, **values}


def widgets() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The inference node's inputs that have a default."""
    inputs = {name: (entry[0], entry[1]) for name, entry in inputs_of(WanVideoDistributedInference).items()}
    return {name: entry for name, entry in inputs.items() if "default" in entry[1]}
