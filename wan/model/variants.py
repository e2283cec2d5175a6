"""What a transformer's file is: a row for each variant that runs, and one for each that is known and refused by name.

A variant is told by what its header says: latent channels in and out, and which optional parts it has. Its two experts
cannot be told apart so: they have the same tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .latent_space import LATENT_SPACES, LatentSpace

SIZES = {5120: "14B", 3072: "5B", 1536: "1.3B"}
"""Channels of the residual stream -> the released size."""
MASK, FRAMES, CONTROL, PICTURE = "mask", "frames", "control", "picture"
"""Parts of the channels behind the latents: which frames are given; the video with grey where none is; the control
video; the first frame, encoded by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A transformer that runs."""

    name: str
    """For people."""
    channels: tuple[int, int]
    """Latent channels in, with those of a picture, and out."""
    parts: frozenset[str] = frozenset()
    """Of tensors' names, between dots: one of each optional part that it has."""
    releases: Mapping[int, str] = field(hash=False)
    """Channels of the residual stream -> what its releases of that size are called."""
    takes: tuple[str, ...] = ()
    """Tensors of a job (`distributed/job/input_tensors.py`) that it may be given beside text."""
    image: tuple[str, ...] = ()
    """What the channels behind the latents are, in their order: names in `wan.sampling.image_channels.CHANNELS`."""
    controlled: bool = False
    """Whether a control video is read beside the noise."""
    known_frames: bool = False
    """Frames that are given stay in the latents, at timestep 0."""
    frames_in_front: int = 0
    """Latent frames that are sampled in front of the video's: of the picture of who it shows."""
    boundary: float | None = None
    """Where the official code changes experts; None: it has one."""

    @property
    def latents(self) -> LatentSpace:
        return LATENT_SPACES[self.channels[1]]

    @property
    def image_channels(self) -> bool:
        """Whether what it starts from or follows is further channels of its input; then it needs some of that."""
        return bool(self.image)

    @property
    def image_latents(self) -> int:
        """How many videos' latents are among those channels."""
        return len([name for name in self.image if name != MASK])

    @property
    def mask_index(self) -> int:
        """The channel in front of which the mask is, among those behind the latents; 0 too where there is none."""
        return self.channels[1] * self.image.index(MASK) if MASK in self.image else 0


_ROWS = (
    Variant(
        name="T2V",
        channels=(16, 16),
        releases={5120: "Wan2.2 T2V A14B or Wan2.1 T2V 14B", 1536: "Wan2.1 T2V 1.3B"},
        boundary=0.875,
    ),
    Variant(
        name="I2V",
        channels=(36, 16),
        releases={5120: "Wan2.2 I2V A14B", 1536: "Wan2.1 Fun InP 1.3B"},
        takes=("start_image", "end_image", "image_conditioning"),
        image=(MASK, FRAMES),
        boundary=0.9,
    ),
    Variant(
        name="Wan2.1 I2V",
        channels=(36, 16),
        parts=frozenset({"img_emb"}),
        releases={5120: "Wan2.1 I2V 14B", 1536: "Wan2.1 Fun InP 1.3B"},
        takes=("start_image", "end_image", "image_conditioning", "clip_features"),
        image=(MASK, FRAMES),
    ),
    Variant(
        name="FLF2V",
        channels=(36, 16),
        parts=frozenset({"img_emb", "emb_pos"}),
        releases={5120: "Wan2.1 FLF2V 14B"},
        takes=("start_image", "end_image", "image_conditioning", "clip_features"),
        image=(MASK, FRAMES),
    ),
    Variant(
        name="VACE",
        channels=(16, 16),
        parts=frozenset({"vace_blocks"}),
        releases={5120: "Wan2.1 VACE 14B or Wan2.2 VACE-Fun A14B", 1536: "Wan2.1 VACE 1.3B"},
        takes=("control_video", "control_mask", "reference_images", "vace_context", "vace_strength"),
        controlled=True,
        boundary=0.875,
    ),
    Variant(
        name="Fun-Control",
        channels=(52, 16),
        parts=frozenset({"ref_conv"}),
        releases={5120: "Wan2.2 Fun Control A14B"},
        takes=("control_video", "start_image", "reference_images", "image_conditioning", "reference_latent"),
        image=(CONTROL, MASK, PICTURE),
        boundary=0.9,
    ),
    Variant(
        name="Wan2.1 Fun-Control",
        channels=(48, 16),
        parts=frozenset({"img_emb"}),
        releases={5120: "Wan2.1 Fun Control 14B", 1536: "Wan2.1 Fun Control 1.3B"},
        takes=("control_video", "start_image", "image_conditioning", "clip_features"),
        image=(CONTROL, PICTURE),
    ),
    Variant(
        name="Wan2.1 Fun-Control V1.1",
        channels=(48, 16),
        parts=frozenset({"img_emb", "ref_conv"}),
        releases={5120: "Wan2.1 Fun V1.1 Control 14B", 1536: "Wan2.1 Fun V1.1 Control 1.3B"},
        takes=(
            *("control_video", "start_image", "reference_images", "image_conditioning", "reference_latent"),
            "clip_features",
        ),
        image=(CONTROL, PICTURE),
    ),
    Variant(
        name="Fun-Camera",
        channels=(36, 16),
        parts=frozenset({"control_adapter"}),
        releases={5120: "Wan2.2 Fun Camera A14B"},
        takes=("start_image", "image_conditioning", "camera_conditions"),
        image=(MASK, PICTURE),
        boundary=0.9,
    ),
    Variant(
        name="Wan2.1 Fun-Camera",
        channels=(32, 16),
        parts=frozenset({"img_emb", "control_adapter"}),
        releases={5120: "Wan2.1 Fun V1.1 Camera 14B", 1536: "Wan2.1 Fun V1.1 Camera 1.3B"},
        takes=("start_image", "image_conditioning", "camera_conditions", "clip_features"),
        image=(PICTURE,),
    ),
    Variant(
        name="Animate",
        channels=(36, 16),
        parts=frozenset({"img_emb", "pose_patch_embedding", "motion_encoder", "face_adapter", "face_encoder"}),
        releases={5120: "Wan2.2 Animate 14B"},
        takes=(
            "image_conditioning",
            "clip_features",
            "pose_video_latent",
            "face_video_pixels",
            "face_video_pixels_null",
        ),
        image=(MASK, FRAMES),
        frames_in_front=1,
    ),
    Variant(
        name="TI2V-5B",
        channels=(48, 48),
        releases={3072: "Wan2.2 TI2V 5B"},
        takes=("start_image", "noise_mask"),
        known_frames=True,
    ),
    Variant(
        name="Fun-InP 5B",
        channels=(100, 48),
        releases={3072: "Wan2.2 Fun InP 5B"},
        takes=("start_image", "end_image", "image_conditioning", "noise_mask"),
        image=(MASK, FRAMES),
        known_frames=True,
    ),
    Variant(
        name="Fun-Control 5B",
        channels=(148, 48),
        parts=frozenset({"ref_conv"}),
        releases={3072: "Wan2.2 Fun Control 5B"},
        takes=(
            *("control_video", "start_image", "reference_images", "image_conditioning", "reference_latent"),
            "noise_mask",
        ),
        image=(CONTROL, MASK, PICTURE),
        known_frames=True,
    ),
    Variant(
        name="Fun-Camera 5B",
        channels=(100, 48),
        parts=frozenset({"control_adapter"}),
        releases={3072: "Wan2.2 Fun Camera 5B"},
        takes=("start_image", "image_conditioning", "camera_conditions", "noise_mask"),
        image=(MASK, PICTURE),
        known_frames=True,
    ),
)
VARIANTS = {row.name: row for row in _ROWS}
RUNNABLE = f"a Wan transformer ({', '.join(VARIANTS)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A transformer that is known and does not run."""

    name: str
    parts: frozenset[str] = frozenset()
    """Of tensors' names, between dots: any of them tells it."""
    channels: tuple[tuple[int, int], ...] = ()
    """Any of them tells it, where it has no part of its own."""


# In order: the first that fits decides.
REFUSED = (
    Refused(
        name="a Wan S2V transformer",
        parts=frozenset({"casual_audio_encoder", "audio_injector", "trainable_cond_mask"}),
    ),
    Refused(
        name="a Wan transformer with an audio branch (S2V, MultiTalk, HuMo)",
        parts=frozenset({"audio_proj", "audio_cross_attn"}),
    ),
    Refused(name="a Wan SCAIL-2 transformer", parts=frozenset({"patch_embedding_mask"})),
    Refused(name="a Wan SCAIL transformer", parts=frozenset({"patch_embedding_pose"})),
    Refused(
        name="a SkyReels DF (diffusion forcing) transformer",
        parts=frozenset({"fps_embedding", "fps_projection"}),
    ),
    Refused(
        name="a Wan transformer with Lynx adapters",
        parts=frozenset({"ip_adapter", "ref_adapter", "to_k_ip", "to_k_ref"}),
    ),
    Refused(name="a Wan transformer with Stand-In merged into it", parts=frozenset({"q_loras", "k_loras", "v_loras"})),
    Refused(
        name="a Wan transformer with a Uni3C controlnet",
        parts=frozenset({"controlnet", "controlnet_patch_embedding", "controlnet_blocks"}),
    ),
    Refused(name="a Wan transformer with video sparse attention (FastWan)", parts=frozenset({"to_gate_compress"})),
    Refused(name="a ReCamMaster transformer", parts=frozenset({"cam_encoder"})),
    Refused(name="a UniAnimate transformer", parts=frozenset({"dwpose_embedding", "randomref_embedding_pose"})),
    Refused(name="a FlashVSR transformer", parts=frozenset({"LQ_proj_in"})),
)
_OPTIONAL = frozenset().union(*(variant.parts for variant in _ROWS))


def optional_parts(names: Collection[str]) -> frozenset[str]:
    """Which parts that only some variants have are among a transformer's tensors (official names)."""
    return _OPTIONAL & {part for name in names for part in name.split(".")}


@functools.cache
def variant_of(channels: tuple[int, int], parts: frozenset[str]) -> Variant:
    """The row of latent channels (in, out) and optional parts. Raises ValueError if there is none."""
    for variant in _ROWS:
        if (variant.channels, variant.parts) == (channels, parts):
            return variant
    allowed = ", ".join(f"{_told(row.channels, row.parts)} ({row.name})" for row in _ROWS)
    raise ValueError(f"it is a Wan variant with {_told(channels, parts)}, not one of {allowed}; expected {RUNNABLE}")


def _told(channels: tuple[int, int], parts: frozenset[str]) -> str:
    """What tells a variant, for people."""
    has = f" and {', '.join(sorted(parts))}" if parts else ""
    return f"{channels[0]} latent channels in and {channels[1]} out{has}"


def check_runs(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses, by its name, a Wan transformer that does not run.

    Args:
        shapes: tensor name -> shape, official names. What tells a size and is damaged is left to `config_from_shapes`.
    Raises:
        ValueError: naming the variant and what runs.
    """
    parts = {part for name in shapes for part in name.split(".")}
    embedding, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    channels = (embedding[1], head[0] // 4) if len(embedding) == 5 and len(head) == 2 else None
    for row in REFUSED:
        if not row.parts.isdisjoint(parts):
            raise ValueError(f"it is {row.name}; expected {RUNNABLE}")
        if channels in row.channels:
            raise ValueError(
                f"it is {row.name} ({channels[0]} latent channels in and {channels[1]} out); expected {RUNNABLE}"
            )
    if channels is not None:
        variant_of(channels, optional_parts(shapes))


def takers(tensor: str) -> str:
    """The variants that may be given a tensor, for messages."""
    return ", ".join(row.name for row in _ROWS if tensor in row.takes)
