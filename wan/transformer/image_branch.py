"""The image branch of Wan2.1's I2V and FLF2V: CLIP features of pictures -> rows that cross-attention attends to.

Its keys and values are in cross_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.config import PICTURE_ROWS, WanConfig
from ..model.linear import Linear


class ImageEmbedding(nn.Module):
    """Two layers between two layer norms. FLF2V adds a position first: it has two pictures."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(config.clip_dim),
            Linear(config.clip_dim, config.clip_dim),
            nn.GELU(),
            Linear(config.clip_dim, config.dim),
            nn.LayerNorm(config.dim),
        )
        places = nn.Parameter(torch.empty(1, config.pictures * PICTURE_ROWS, config.clip_dim))
        self.register_parameter("emb_pos", places if config.pictures > 1 else None)

    def forward(self, features: Tensor) -> Tensor:
        """features: [R, clip_dim], 257 rows for each picture, the first frame's first -> [R, C] float32.

        A single picture in a model of two gets the first one's positions, as in ComfyUI.
        """
        features = features.float()
        if isinstance(places := self.emb_pos, nn.Parameter):
            features = features + places[0, : len(features)]
        up, down = self.proj[1], self.proj[3]
        embedded: Tensor = self.proj[4](down(self.proj[2](up(self.proj[0](features)))).float())
        return embedded
