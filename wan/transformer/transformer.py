"""The Wan video diffusion transformer, with the official parameter names and dtype policy.

Shapes: S = tokens held here, H = heads, D = channels per head, C = dim, R = text tokens (512).
Everything is unbatched: a video is one sample. There is no distributed code: `forward` takes any run of tokens
with its rotary table, and whatever joins tokens goes through `SelfAttention.attention`, which may be replaced.

Matrix products run in their layer's `compute_dtype`; the residual stream, modulation, normalisation, time path and head
are float32 (`parameter_dtype`), as in the official code under autocast. The arithmetic around a block's products is its
`ops`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import EPS, FACE_EVERY, WanConfig
from ..model.eight_bits import E4M3, KeptWeight
from ..model.latent_space import PATCH_SIZE
from ..model.linear import Linear
from ..model.ops import Rope
from .animate import FaceAdapter, FaceEncoder
from .block import Block, Stream, WanBlock, Which, per_token
from .camera import CameraAdapter
from .conditions import NOTHING, Beside
from .context import Context
from .image_branch import ImageEmbedding
from .motion_encoder import MotionEncoder
from .patch_embedding import PatchEmbedding
from .vace import VaceBlock


def parameter_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    """Dtype a parameter is kept in: `compute` for the large matrix products, float32 for the rest."""
    head, _, tail = name.partition(".")
    fp32 = (
        head in ("time_embedding", "time_projection", "head", "motion_encoder")
        or "norm" in tail
        or name.endswith("modulation")
    )
    # Two of the layers of img_emb are norms that are not called so; what is added before them is as wide.
    fp32 = fp32 or name.startswith(("img_emb.proj.0", "img_emb.proj.4", "img_emb.emb_pos"))
    return torch.float32 if fp32 else compute


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.head = Linear(config.dim, config.out_dim * PATCH_SIZE[1] * PATCH_SIZE[2])

    def forward(self, x: Tensor, e: Tensor, which: Which) -> Tensor:
        """x: [S, C], e: [n, C], float32 -> [S, 4 * out_dim]."""
        shift, scale = per_token(self.modulation + e[:, None], which)
        return self.head(F.layer_norm(x, (self.dim,), eps=EPS) * (1 + scale) + shift)


class WanModel(nn.Module):
    """Predicts the velocity (noise minus video) of latent tokens. Parameter names are the official ones."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self._exact: bool | None = None
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_dim, dim)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if config.image_branch:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        if config.reference_frame:
            self.ref_conv = PatchEmbedding(config.reference_dim, dim, PATCH_SIZE[1:])
        if config.camera:
            self.control_adapter = CameraAdapter(config)
        if config.animates:
            self.pose_patch_embedding = PatchEmbedding(config.out_dim, dim)
            self.motion_encoder = MotionEncoder(config)
            self.face_encoder = FaceEncoder(config)
            self.face_adapter = FaceAdapter(config)
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.control_dim, dim)
            self.vace_blocks = nn.ModuleList(VaceBlock(config, first=i == 0) for i in config.vace_layers)
        self.head = Head(config)

    @property
    def running_order(self) -> list[Block]:
        """All blocks, in the order in which they run (`WanConfig.block_names`)."""
        blocks = [self.get_submodule(name) for name in self.config.block_names]
        return [block for block in blocks if isinstance(block, Block)]

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded and streamed by itself, in the order in which it runs (`WanConfig.unit_names`)."""
        return [self.get_submodule(name) for name in self.config.unit_names]

    def keep_exact(self, numbers: Collection[int]) -> None:
        """From now on the main blocks of these numbers, and VACE's behind them, round nothing at any step."""
        names = self.config.with_vace_blocks(numbers)
        for name, block in zip(self.config.block_names, self.running_order, strict=True):
            block.always_exact = name in names
        self._exact = None
        self.compute_exactly(False)

    def compute_exactly(self, exact: bool) -> None:
        """From now on, for all blocks: see `Block.compute_exactly`."""
        if exact != self._exact:
            for block in self.running_order:
                block.compute_exactly(exact)
        self._exact = exact

    def forward(
        self,
        tokens: Tensor,
        timestep: Tensor,
        text: Context,
        rope: Rope,
        which: Which = None,
        beside: Beside = NOTHING,
    ) -> Tensor:
        """One evaluation.

        Args:
            tokens: [S, 4 * in_dim], float32 (patch.py's order).
            timestep: [n] different ones, float32, 0 to 1000; n is 1 unless `which` is given.
            text: the prompt.
            rope: cos, sin of these tokens, each [S, D/2].
            which: [S], int64, the index into `timestep` of each token: what depends on the timestep is computed for
                the few different ones, not for every token.
            beside: what else the model reads, as far as it has the parts for it.
        Returns:
            velocity [S, 4 * out_dim], float32.
        """
        e = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim))
        e6 = self.time_projection(e).unflatten(-1, (6, -1))
        attended = [(text, text.embedded(self.text_embedding))]
        if beside.picture is not None:
            attended.append((beside.picture, beside.picture.embedded(self.img_emb)))
        x = self.patch_embedding(tokens).float()
        if beside.pose is not None:
            x = beside.pose.added_to(x, self.pose_patch_embedding)
        face = beside.face
        face_rows = None if face is None else face.rows(self.motion_encoder, self.face_encoder, x.device)
        if beside.camera is not None:
            x = beside.camera.added_to(x, self.control_adapter)
        if beside.reference is not None:
            x = beside.reference.put_into(x, self.ref_conv)
        controls = beside.controls
        streams: list[Tensor] = []
        begin = [x] if controls else []
        # The only hold on the stream while a block has it.
        main, ops = [Stream(x)], self.running_order[0].ops
        del x
        for i, block in enumerate(self.blocks):
            main.append(block(main, e6, which, rope, attended))
            if self.config.animates and i % FACE_EVERY == 0:
                x = main.pop().sum(ops)
                # Without a face too: who brings its weights counts on it.
                added = self.face_adapter.fuser_blocks[i // FACE_EVERY](x, face_rows, face)
                main.append(Stream(x if added is None else x + added))
                del x, added
            if controls and i in self.config.vace_layers:
                streams = streams or [self.vace_patch_embedding(control.values) for control in controls]
                strengths = [control.strength for control in controls]
                vace = self.vace_blocks[self.config.vace_layers.index(i)]
                hint = vace(streams, begin, strengths, e6, which, rope, attended)
                main.append(Stream(main.pop().sum(ops) + hint))
                del hint
        velocity: Tensor = self.head(main.pop().sum(ops), e, which)
        return velocity if beside.reference is None else beside.reference.taken_out(velocity)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[n] -> [n, dim] float32: cosines, then sines. Angles in float64: float32 is off by 1e-4 at t near 1000."""
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = torch.outer(timestep.double(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def meta_model(
    config: WanConfig,
    compute: torch.dtype,
    kept: Mapping[str, KeptWeight] | None = None,
    *,
    fp8_products: Collection[str] = (),
) -> WanModel:
    """The model without memory, each parameter in its dtype (`parameter_dtype`), frozen.

    Args:
        kept: the weights in 8 bits, by parameter name.
        fp8_products: names of layers, whose weights are in `kept` as e4m3: they multiply fp8 by fp8.
    """
    with torch.device("meta"):
        model = WanModel(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, compute))
        parameter.requires_grad_(False)
    for name, stored in (kept or {}).items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear), name
        layer.keep(stored, parameter_dtype(name, compute))
    for layer in map(model.get_submodule, fp8_products):
        assert isinstance(layer, Linear) and layer.weight.dtype == E4M3, layer
        layer.fp8_product = True
    return model.eval()
