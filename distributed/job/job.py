"""The job: everything a run needs, as frozen dataclasses with validation and JSON.

Runs everywhere: ComfyUI builds a job, the agent and the workers read it back. There is a class for each kind of work.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ...wan.model.config import HIGH_NOISE, LOW_NOISE
from ...wan.video.video_formats import FRAME_PIXEL_BYTES, VideoFormat
from .errors import JobError, check, check_text
from .evaluator import ITEM_BYTES
from .model_files import FileIdentity, LoraFile, ModelFiles, check_files, check_loras
from .parallel import Parallel
from .sampling import EVERYWHERE, RoundedTimesteps, Sampling
from .strict_json import build
from .switches import MAX_GPUS

VERSION = 5
__all__ = [
    "FFN_CHUNK",
    "MAX_GPUS",
    "VERSION",
    "FileIdentity",
    "ForwardsJob",
    "GroupJob",
    "Job",
    "JobError",
    "LoraFile",
    "ModelFiles",
    "Parallel",
    "Sampling",
    "Text",
    "VaeJob",
]
"""A job's parts are imported from here; model_files.py, parallel.py, sampling.py and switches.py hold most."""

MAX_PROMPT = 100_000
"""Characters; the text encoder reads 512 tokens."""
FLOAT_BYTES = ITEM_BYTES["float32"]
MAX_BYTES = 64 << 30
"""Of a VAE's latents, or of its frames: 81 of 1280x720 are 0.9 GB."""
FFN_CHUNK = 4096
"""Tokens per feed-forward call under `memory_optimization`: large enough to keep a GPU busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Prompts to encode inside the job. Absent when `inputs.safetensors` holds the embeddings."""

    prompt: str
    negative_prompt: str = ""
    """Empty: the official default negative prompt."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            check_text(name, getattr(self, name), MAX_PROMPT)


J = TypeVar("J", bound="GroupJob")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupJob(ABC):
    """What a group of processes is given to do, whatever it is."""

    KIND: ClassVar[str]
    STOPS_IN: ClassVar[tuple[str, ...]] = ("denoise",)
    """Phases in which a cancelled job's ranks come to a place where they stop, and stay."""
    id: str
    """Random, hexadecimal; the result must carry the same one."""
    parallel: Parallel
    warnings: tuple[str, ...] = ()
    """What the user is told in the status, such as a raised frame count."""
    verbose: bool = False
    """Workers log at DEBUG level."""
    version: int = VERSION

    def __post_init__(self) -> None:
        check(self.version == VERSION, "version", self.version, str(VERSION))
        check(0 < len(self.id) <= 64 and all(c in "0123456789abcdef" for c in self.id), "id", self.id, "hexadecimal")

    @property
    @abstractmethod
    def files(self) -> tuple[FileIdentity, ...]:
        """All that it reads."""

    @property
    @abstractmethod
    def transformer(self) -> tuple[FileIdentity, ...]:
        """What it is known by to people: the files of its model, or of one of two experts; empty where it has none."""

    @property
    @abstractmethod
    def shared(self) -> Hashable:
        """Jobs in which this is equal can use each other's processes, where these are as many on the same GPUs."""

    @property
    def encodes(self) -> bool:
        """It runs the text encoder."""
        return False

    @property
    def looks(self) -> bool:
        """It runs CLIP on pictures."""
        return False

    @property
    def file_format(self) -> VideoFormat | None:
        """Of the video that it writes; None if it writes none."""
        return None

    def made_bytes(self, upscale: int = 1) -> int:
        """At most of what it writes into its folder. upscale: as of `Job.video_bytes`."""
        return 0

    def to_json(self) -> str:
        return json.dumps({"kind": self.KIND, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls: type[J], text: str) -> J:
        """Reads what `to_json` wrote. Raises JobError naming what is missing, unknown or wrong, or of another kind."""
        try:
            value = json.loads(text)
            kind = value.pop("kind", None) if isinstance(value, dict) else None
            found = [known for known in JOBS if issubclass(known, cls) and kind == known.KIND]
            if isinstance(value, dict):
                kinds = ", ".join(known.KIND for known in JOBS if issubclass(known, cls))
                check(len(found) == 1, "kind", kind, f"one of {kinds}")
            job: J = build(found[0] if found else cls, value, "job.json")
        except (ValueError, RecursionError) as error:
            raise JobError(f"job.json is not a job this version can run: {error}") from error
        return job


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(GroupJob):
    """One video, self-contained: files, settings and, beside it, the input tensors."""

    KIND: ClassVar[str] = "video"
    model: ModelFiles
    sampling: Sampling
    text: Text | None = None
    decode: bool = True
    """Off: only the latents are kept, no video is made."""
    preview: bool = False
    """Show while it is sampled what the video is going to be."""
    frames: bool = False
    """Keep the decoded frames beside the video, as no codec has rounded them."""

    def __post_init__(self) -> None:
        GroupJob.__post_init__(self)
        check(self.decode or not self.frames, "frames", self.frames, "False for a job that makes latents only")
        if self.text is not None:
            check(len(self.model.text_encoder) > 0, "model.text_encoder", (), "given when the job encodes a prompt")

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return self.model.all()

    @property
    def transformer(self) -> tuple[FileIdentity, ...]:
        return self.model.transformer

    @property
    def vae(self) -> tuple[FileIdentity, ...]:
        return self.model.vae

    @property
    def shared(self) -> Hashable:
        return self.KIND

    @property
    def encodes(self) -> bool:
        return self.text is not None

    @property
    def looks(self) -> bool:
        return bool(self.model.clip_vision)

    @property
    def file_format(self) -> VideoFormat | None:
        return self.sampling.file_format if self.decode else None

    @property
    def _pixels(self) -> int:
        """Of all frames, at the size that is sampled."""
        return self.sampling.width * self.sampling.height * self.sampling.num_frames

    def video_bytes(self, upscale: int = 1) -> int:
        """At most of the video's file. upscale: pixels per row and column that the VAE makes for one of the video."""
        each = self.sampling.file_format.pixel_bytes(self.sampling.crf) if self.decode else 0
        return int(self._pixels * upscale**2 * each)

    def made_bytes(self, upscale: int = 1) -> int:
        # Latents are 4 bytes x 16 channels per 8x8x4 pixels.
        frames = FRAME_PIXEL_BYTES * upscale**2 if self.frames else 0
        return int(self._pixels * (0.25 + frames)) + self.video_bytes(upscale)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardsJob(GroupJob):
    """Evaluations of one transformer, asked for by a sampler elsewhere (evaluator.py), until it has asked for all."""

    KIND: ClassVar[str] = "forwards"
    model: tuple[FileIdentity, ...]
    """The transformer's files: one, or every shard."""
    loras: tuple[LoraFile, ...] = ()
    side: str = ""
    """high_noise or low_noise: which of the changes counts in a LoRA file that has both; empty: such a file is
    refused."""
    rounded: RoundedTimesteps = EVERYWHERE
    """Of the sampling: elsewhere nothing is rounded to 8 bits (`exact_steps`)."""

    def __post_init__(self) -> None:
        GroupJob.__post_init__(self)
        check(len(self.model) > 0, "model", (), "at least one file")
        check_files("model", len(self.model))
        check_loras("loras", len(self.loras))
        check(self.side in ("", HIGH_NOISE, LOW_NOISE), "side", self.side, f"empty, {HIGH_NOISE} or {LOW_NOISE}")
        parallel = self.parallel
        check(not parallel.hosts, "hosts", parallel.hosts, "empty for a sampler of ComfyUI's: its latents stay here")
        check(
            parallel.attention != "sol",
            "attention", parallel.attention,
            "another kernel for a sampler of ComfyUI's: which of its steps may be sparse is not known. Choose 'auto'",
        )  # fmt: skip

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return (*self.model, *(lora.file for lora in self.loras))

    @property
    def transformer(self) -> tuple[FileIdentity, ...]:
        return self.model

    @property
    def shared(self) -> Hashable:
        # The ranks hold several models, as far as there is room.
        return self.KIND


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeJob(GroupJob):
    """Latents decoded, or frames encoded, for ComfyUI: both lie in memory, as float32 but for `given_dtype`."""

    KIND: ClassVar[str] = "vae"
    STOPS_IN: ClassVar[tuple[str, ...]] = ("encode", "decode")
    vae: tuple[FileIdentity, ...]
    encode: bool
    """Off: decode."""
    given: tuple[int, ...]
    """[B, C, T, h, w] as ComfyUI's LATENT, un-normalised, or [B, 3, F, H, W] in -1 to 1."""
    made: tuple[int, ...]
    """The other of them; what is decoded is not cut to -1 to 1."""

    def __post_init__(self) -> None:
        GroupJob.__post_init__(self)
        check(len(self.vae) > 0, "vae", (), "at least one file")
        check_files("vae", len(self.vae))
        check(not self.parallel.hosts, "hosts", self.parallel.hosts, "empty for VAE nodes of ComfyUI's")
        for name, shape in (("given", self.given), ("made", self.made)):
            ok = len(shape) == 5 and all(size > 0 for size in shape) and math.prod(shape) * FLOAT_BYTES <= MAX_BYTES
            check(ok, name, list(shape), f"five sizes of 1 and more, at most {MAX_BYTES} bytes together")
        check(self.given[0] == self.made[0], "made", list(self.made), f"of {self.given[0]} videos, as given")

    @property
    def memory(self) -> tuple[slice, slice]:
        """Bytes of what is given and of what is made."""
        given, made = math.prod(self.given) * ITEM_BYTES[self.given_dtype], math.prod(self.made) * FLOAT_BYTES
        return slice(0, given), slice(given + given % FLOAT_BYTES, given + given % FLOAT_BYTES + made)

    @property
    def given_dtype(self) -> str:
        """Frames are given as the VAE takes them."""
        return self.parallel.vae_dtype if self.encode else "float32"

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        return self.vae

    @property
    def transformer(self) -> tuple[FileIdentity, ...]:
        return ()

    @property
    def shared(self) -> Hashable:
        # Beside the models of samplers, with which it takes turns.
        return ForwardsJob.KIND


JOBS: tuple[type[GroupJob], ...] = (Job, ForwardsJob, VaeJob)
"""Every kind."""
