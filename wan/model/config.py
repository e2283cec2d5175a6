"""Shapes of the Wan video diffusion transformers, as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .variants import SIZES, Variant, optional_parts, variant_of

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"
"""A model's experts: of the first steps, and of the last."""
HEAD_DIM = 128
"""Channels per attention head in every released Wan model."""
MAX_SIZE = 1 << 20
"""Of a tensor that decides a size: far above any model, far below what an allocation could not describe."""
MAX_LAYERS = 1000
FACE_CHANNELS = 3
FACE_SIDE = 512
"""Pixels of the pictures of a face."""
FACE_EVERY = 5
"""Blocks from one to the next of those that are followed by attention to a face."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WanConfig:
    """One transformer. No defaults: a variant says everything."""

    dim: int
    """Channels of the residual stream."""
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    """Latent channels in, with image conditioning channels if any."""
    out_dim: int
    """Latent channels out."""
    text_dim: int
    """Channels of the text encoder's rows."""
    freq_dim: int
    """Channels of the sinusoidal timestep embedding."""
    parts: frozenset[str] = frozenset()
    """Which of the parts that only some variants have (variants.py). What follows are these parts' sizes."""
    clip_dim: int = 1280
    """Channels of the CLIP features that the image branch takes."""
    control_dim: int = 96
    """Channels of VACE's control."""
    reference_dim: int = 16
    """Channels of a reference picture's latents."""
    camera_dim: int = 24 * 8**2
    """Channels of the camera's rays: of a latent pixel's pixels and frames, six each."""
    motion_dim: int = 512
    """Channels of what a face does in a picture."""
    face_dim: int = 1024
    """Channels of each of a frame's rows of a face, on the way there."""
    face_blocks: int = 0
    """Main blocks that are followed by attention to a face."""
    vace_layers: tuple[int, ...] = ()
    """The main blocks behind which the VACE blocks run."""

    def __post_init__(self) -> None:
        for name, size in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(size, int) and size < 1 and name != "face_blocks":
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"dim is {self.dim} and num_heads is {self.num_heads}; dim must be an even multiple of num_heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def block_names(self) -> tuple[str, ...]:
        """Of the model's blocks, in the order in which they run."""
        names = []
        for i in range(self.num_layers):
            names.append(f"blocks.{i}")
            names += [f"vace_blocks.{self.vace_layers.index(i)}"] if i in self.vace_layers else []
        return tuple(names)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Of what holds most weights, in the order in which it runs: blocks, and attention to a face behind some."""
        names = []
        for name in self.block_names:
            kind, _, number = name.partition(".")
            names.append(name)
            if self.animates and kind == "blocks" and int(number) % FACE_EVERY == 0:
                names.append(f"face_adapter.fuser_blocks.{int(number) // FACE_EVERY}")
        return tuple(names)

    def with_vace_blocks(self, numbers: Collection[int]) -> frozenset[str]:
        """Names of the main blocks of these numbers, and of the VACE blocks that run behind them."""
        behind = [f"vace_blocks.{index}" for index, layer in enumerate(self.vace_layers) if layer in numbers]
        return frozenset([*behind, *(f"blocks.{number}" for number in numbers)])

    @property
    def image_branch(self) -> bool:
        """Tokens attend to CLIP features of pictures."""
        return "img_emb" in self.parts

    @property
    def reference_frame(self) -> bool:
        """A reference picture may be in front of the video, as tokens of its own."""
        return "ref_conv" in self.parts

    @property
    def camera(self) -> bool:
        """Where the camera is may be told."""
        return "control_adapter" in self.parts

    @property
    def animates(self) -> bool:
        """It takes over somebody's pose and face."""
        return "face_adapter" in self.parts

    @property
    def pictures(self) -> int:
        """How many the image branch knows the places of."""
        return 2 if "emb_pos" in self.parts else 1

    @property
    def variant(self) -> Variant:
        """Its row. Raises ValueError if no variant has such channels and parts."""
        return variant_of((self.in_dim, self.out_dim), self.parts)

    def describe(self) -> str:
        """For people: "T2V 14B"; of another size than the releases its layers and channels."""
        size = SIZES.get(self.dim)
        return f"{self.variant.name} " + (size or f"of {self.num_layers} layers and {self.dim} channels")

    def differences(self, other: WanConfig) -> str:
        """What sets two models apart that `describe` calls the same, in brackets; nothing if it names them apart."""
        if self.describe() != other.describe():
            return ""
        values = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return f" ({', '.join(f'{name} {one} and {two}' for name, one, two in values if one != two)})"


TEXT_LEN = 512
"""Rows of text the cross-attention sees; shorter prompts are padded with zero rows, longer ones cut."""
PICTURE_ROWS = 257
"""CLIP features of a picture: one for all of it, and 16 x 16 patches."""
CLIP_PICTURE = (3, 224, 224)
"""Channels, rows and columns of what CLIP looks at."""
EPS = 1e-6
"""Of every normalisation layer."""

_OPTIONAL_SIZES = {
    "clip_dim": ("img_emb.proj.0.weight", 0),
    "control_dim": ("vace_patch_embedding.weight", 1),
    "reference_dim": ("ref_conv.weight", 1),
    "camera_dim": ("control_adapter.conv.weight", 1),
    "motion_dim": ("motion_encoder.dec.direction.weight", 0),
    "face_dim": ("face_encoder.conv2.conv.weight", 1),
}
"""Field of `WanConfig` -> the tensor and the dimension that tell it, where a model has that part."""


def _optional_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = {}
    for name, (tensor, dimension) in _OPTIONAL_SIZES.items():
        if tensor in shapes:
            if len(shapes[tensor]) <= dimension:
                raise ValueError(f"tensor {tensor} has shape {shapes[tensor]}; it must have more dimensions")
            found[name] = shapes[tensor][dimension]
    return found


def _block_count(shapes: Mapping[str, tuple[int, ...]], kind: str) -> int:
    rest = (name.removeprefix(f"{kind}.").partition(".")[0] for name in shapes if name.startswith(f"{kind}."))
    count = len({int(number) for number in rest if number.isdecimal()})
    if count > MAX_LAYERS:
        raise ValueError(f"it has {count} blocks; at most {MAX_LAYERS} are read")
    return count


def _vace_layers(count: int, layers: int, told: tuple[int, ...] | None) -> tuple[int, ...]:
    """The main blocks behind which `count` VACE blocks run."""
    if count == 0:
        return ()
    found = tuple(range(0, layers, max(layers // count, 1)))[:count] if told is None else told
    fits = len(found) == count and found == tuple(sorted(set(found))) and found[0] == 0 and found[-1] < layers
    if not fits:
        raise ValueError(
            f"its {count} VACE blocks run behind blocks {list(found)} of {layers}; vace_layers must name as many, in "
            "order, from block 0 on"
        )
    return found


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    num_heads: int | None = None,
    vace_layers: tuple[int, ...] | None = None,
) -> WanConfig:
    """Reads the sizes off a checkpoint's tensor shapes (official names).

    Args:
        shapes: tensor name -> shape.
        num_heads: from the checkpoint's config.json; without it a head has 128 channels, as in every release.
        vace_layers: from the same; without it the VACE blocks are spread evenly, as in every release.
    Raises:
        ValueError: a tensor that decides a size is missing or has another rank, or the VACE blocks are not as many as
            `vace_layers`.
    """
    decisive = {
        "head.modulation": 3,
        "blocks.0.ffn.0.weight": 2,
        "patch_embedding.weight": 5,
        "head.head.weight": 2,
        "text_embedding.0.weight": 2,
        "time_embedding.0.weight": 2,
    }
    for name, rank in decisive.items():
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing; a Wan transformer has it")
        if len(shapes[name]) != rank:
            raise ValueError(f"tensor {name} has shape {shapes[name]}; it must have {rank} dimensions")
        if not all(1 <= size <= MAX_SIZE for size in shapes[name]):
            raise ValueError(f"tensor {name} has shape {shapes[name]}; its sizes must be 1 to {MAX_SIZE}")
    dim = shapes["head.modulation"][-1]
    if num_heads is None and dim % HEAD_DIM:
        raise ValueError(f"dim is {dim}; without a config.json it must be a multiple of {HEAD_DIM}")
    layers = _block_count(shapes, "blocks")
    config = WanConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_heads=dim // HEAD_DIM if num_heads is None else num_heads,
        num_layers=layers,
        in_dim=shapes["patch_embedding.weight"][1],
        out_dim=shapes["head.head.weight"][0] // 4,
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        parts=optional_parts(shapes),
        face_blocks=_block_count(shapes, "face_adapter.fuser_blocks"),
        vace_layers=_vace_layers(_block_count(shapes, "vace_blocks"), layers, vace_layers),
    )
    if config.animates and config.face_blocks != -(-layers // FACE_EVERY):
        raise ValueError(
            f"it has {config.face_blocks} blocks of a face adapter; Wan Animate has one behind every {FACE_EVERY}th of "
            f"its {layers} blocks"
        )
    return replace(config, **_optional_sizes(shapes))
