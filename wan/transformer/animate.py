"""Somebody who moves as another does: a pose for each latent frame, and a face that the tokens attend to.

    x = embedded latents + embedded pose          behind the frame in front, which shows who it is
    x = x + attention(x to the face's five rows of its frame)     behind every fifth block

(Wan Animate, Cheng et al., 2025, arXiv 2509.14055.) A token attends to its own frame's rows only, so no rank needs
another's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import EPS, WanConfig
from ..model.linear import Linear
from ..model.patch import patchify
from .part import Split, bytes_of, places

FACE_ROWS = 4
"""Of a frame; beside them one that is the same for all."""
FACES_AT_ONCE = 4
"""Pictures in the motion encoder: their first layers are large."""


@dataclass(frozen=True, slots=True)
class Pose:
    """What is added to the video's frames, from the second latent one on; on one rank, if at all."""

    values: Tensor
    """Latents [16, P, h, w], normalised; on a rank those of its tokens that have some, [n, 4 * 16]. Float32."""
    rows: Tensor | None = None
    """[n] int64: which of the rank's tokens they are for."""

    def on_rank(self, split: Split, length: int) -> Pose:
        tokens = patchify(self.values)
        place = places(split, length)
        # Behind the first frame, which has none.
        index = place - len(tokens) // self.values.shape[1]
        rows = ((place >= 0) & (index >= 0) & (index < len(tokens))).nonzero()[:, 0]
        return Pose(tokens[index[rows]], rows)

    def on_device(self, device: torch.device) -> Pose:
        return Pose(self.values.to(device), None if self.rows is None else self.rows.to(device))

    def for_expert(self, *, keep: bool) -> Pose:
        return self

    def device_bytes(self) -> int:
        return bytes_of(self.values, self.rows)

    def added_to(self, x: Tensor, embedding: nn.Module) -> Tensor:
        """x: a rank's tokens as embedded, [S, C] float32."""
        assert self.rows is not None, "the pose is on a rank"
        return x.index_add(0, self.rows, embedding(self.values).float())


class FaceEncoder(nn.Module):
    """A face's motion, frame by frame -> rows for each latent frame but the first."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.face_dim
        self.conv1_local = _InTime(config.motion_dim, FACE_ROWS * width)
        self.conv2 = _InTime(width, width, stride=2)
        self.conv3 = _InTime(width, width, stride=2)
        self.out_proj = Linear(width, config.dim)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, config.dim))

    def forward(self, motion: Tensor) -> Tensor:
        """motion: [F, motion_dim] -> [(F + 3) // 4, 5, C], float32."""
        x = self.conv1_local(motion.T[None])[0].unflatten(0, (FACE_ROWS, -1))
        for layer in (self.conv2, self.conv3, None):
            x = F.silu(F.layer_norm(x.mT.float(), (x.shape[1],), eps=EPS)).mT
            x = x if layer is None else layer(x)
        rows = self.out_proj(x.mT.flatten(0, 1)).unflatten(0, (FACE_ROWS, -1)).transpose(0, 1)
        return torch.cat((rows, self.padding_tokens[0].expand(len(rows), 1, -1).to(rows.dtype)), dim=1).float()


class _InTime(nn.Module):
    """Of a frame and the two before it, the first one standing for what is before all."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, F] -> [n, outputs, F, or half of it rounded up]."""
        y: Tensor = self.conv(F.pad(x.to(self.conv.weight.dtype), (2, 0), mode="replicate"))
        return y


@dataclass(slots=True)
class Face:
    """What somebody's face does, for one expert; on one rank, if at all."""

    pictures: Tensor
    """[3, F, 512, 512] float32 in -1 to 1, in the host's memory: they are read once."""
    frames: int
    """Latent ones of the sequence, with the one in front."""
    order: Tensor | None = None
    """[S] int64: the rank's tokens, one frame behind the other; None: they are so as they are."""
    runs: tuple[tuple[int, int], ...] = ()
    """In that order, of each run of tokens of one frame: which, and how many."""
    here: Tensor | None = None
    """The frames of `runs`, int64, on the device: brought there by each block, they would halt its stream."""
    _rows: Tensor | None = None

    def on_rank(self, split: Split, length: int) -> Face:
        place = places(split, length)
        # What fills a rank up is at its end, and of any frame.
        frame = torch.where(place < 0, length - 1, place) // (length // self.frames)
        order = frame.argsort(stable=True)
        found, counts = frame[order].unique_consecutive(return_counts=True)
        sorted_already = bool((order == torch.arange(len(order))).all())
        runs = tuple(zip(found.tolist(), counts.tolist(), strict=True))
        return Face(self.pictures, self.frames, None if sorted_already else order, runs, found)

    def on_device(self, device: torch.device) -> Face:
        order, here = (None if one is None else one.to(device) for one in (self.order, self.here))
        return replace(self, order=order, here=here)

    def for_expert(self, *, keep: bool) -> Face:
        """What is derived of it stays in any case: it is small."""
        return replace(self)

    def device_bytes(self) -> int:
        return bytes_of(self.order, self.here, self._rows)

    def rows(self, motion_encoder: nn.Module, encoder: nn.Module, device: torch.device) -> Tensor:
        """[frames, 5, C] float32: zeros for the frame in front and behind what there is of the face. Computed once."""
        if self._rows is None:
            parts = self.pictures.movedim(1, 0).split(FACES_AT_ONCE)
            rows = encoder(torch.cat([motion_encoder(part.to(device)) for part in parts]))
            behind = max(self.frames - 1 - len(rows), 0)
            self._rows = F.pad(rows, (0, 0, 0, 0, 1, behind))[: self.frames]
        return self._rows


class FaceBlock(nn.Module):
    """Attention of tokens to the rows of their frame's face."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, self.head_dim = config.dim, config.head_dim
        self.linear1_kv = Linear(dim, 2 * dim)
        self.linear1_q = Linear(dim, dim)
        self.linear2 = Linear(dim, dim)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=EPS)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=EPS)

    def forward(self, x: Tensor, rows: Tensor | None, face: Face | None) -> Tensor | None:
        """x: [S, C], float32; rows: `Face.rows` -> what is to be added, the same; None: there is no face."""
        if rows is None or face is None:
            return None
        dim = (x.shape[1],)
        q = self._heads(self.linear1_q(F.layer_norm(x, dim, eps=EPS)), self.q_norm)
        assert face.here is not None, "the face is on a rank"
        keys_values = self.linear1_kv(F.layer_norm(rows[face.here], dim, eps=EPS).flatten(0, 1))
        k, v = keys_values.chunk(2, dim=1)
        k, v = (part.unflatten(0, (len(face.runs), -1)) for part in (self._heads(k, self.k_norm), self._heads(v, None)))
        q = q if face.order is None else q[face.order]
        runs = q.split([count for _, count in face.runs])
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (run, *pair))).transpose(0, 1)
                for run, *pair in zip(runs, k, v, strict=True)
            ]
        )
        if face.order is not None:
            attended = torch.empty_like(attended).index_copy_(0, face.order, attended)
        added: Tensor = self.linear2(attended.flatten(1)).float()
        return added

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """[n, C] -> [n, H, D], in the dtype of the matrix products."""
        heads = x.unflatten(1, (-1, self.head_dim))
        return heads if norm is None else norm(heads.float()).to(x.dtype)


class FaceAdapter(nn.Module):
    """All of them."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.fuser_blocks = nn.ModuleList(FaceBlock(config) for _ in range(config.face_blocks))
