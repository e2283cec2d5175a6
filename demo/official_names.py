"""Tensors of libraries' models under the names that official files have."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def under_official_names(tensors: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """modules: official module path -> the library's. KeyError for a tensor that no such model has."""
    official = {theirs: ours for ours, theirs in modules.items()}
    split = {name: name.rpartition(".") for name in tensors}
    return {f"{official[module]}.{leaf}": tensors[name] for name, (module, _, leaf) in split.items()}
