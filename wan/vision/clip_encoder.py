"""Pictures -> CLIP's features: transformers' vision model, loaded from any file users have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files.module_weights import fill
from ..files.stored_model import open_model
from ..model.config import CLIP_PICTURE, PICTURE_ROWS
from .clip_keys import EXPECTED, HEADS, PATCH, ClipInfo, check_clip_files

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

    from ..files.stored_tensor import StoredTensor


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a stored tensor, as a parameter of `shape`."""

    whole: StoredTensor
    shape: tuple[int, ...]
    start: int
    """Flat index of its first element."""

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def read_into(self, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        self.whole.read_into(out, start=self.start + start, staging=staging)


def load_clip(
    files: Sequence[str | Path], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIPVisionModel:
    """The layers before the last one, under transformers', open-clip's or the official names.

    Args:
        files: one .safetensors or .pth, or every shard.
        dtype: of the weights; the official code has float16 on a GPU.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    info = check_clip_files(files)
    stored = open_model(files, EXPECTED)
    tensors = stored.weights({part.tensor: part.tensor for part in info.source.values()})
    rows: dict[str, StoredTensor] = {
        name: _Rows(tensors[part.tensor], info.shapes[name], part.index * math.prod(info.shapes[name]))
        for name, part in info.source.items()
    }
    model = _build(info)
    source = {}
    for parameter in model.state_dict():
        # transformers before 5.20 has one more name in front.
        source[parameter] = parameter.removeprefix("vision_model.")
    fill(model, rows, source, stored.label, dtype=dtype, device=device)
    # No weight, and on the meta device like all that the model was built with.
    positions = torch.arange(PICTURE_ROWS, device=device)[None]
    _tower(model).get_submodule("embeddings").register_buffer("position_ids", positions, persistent=False)
    return model


@torch.no_grad()
def encode_pictures(model: CLIPVisionModel, pictures: Tensor) -> Tensor:
    """Pictures [n, 3, 224, 224], as `fit_clip_picture` makes them -> [n * 257, dim], float32, on the model's device.

    The hidden states in front of CLIP's last layer, without a norm, one picture's rows after the other's.
    """
    weight = next(model.parameters())
    states = model(pixel_values=pictures.to(weight.device, weight.dtype)).last_hidden_state
    return states.flatten(0, 1).float()


def _build(info: ClipInfo) -> CLIPVisionModel:
    # On first use: transformers takes seconds to import, and most jobs never need it.
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=info.dim,
        intermediate_size=info.ffn_dim,
        # What the last one makes is not looked at.
        num_hidden_layers=info.layers - 1,
        num_attention_heads=HEADS,
        image_size=CLIP_PICTURE[-1],
        patch_size=PATCH[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    # Only the pooled output goes through it.
    _tower(model).register_module("post_layernorm", torch.nn.Identity())
    return model


def _tower(model: CLIPVisionModel) -> torch.nn.Module:
    """What holds the layers: the model itself, or its one part in transformers before 5.20."""
    return dict(model.named_children()).get("vision_model", model)
