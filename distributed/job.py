"""The job: everything a run needs, as frozen dataclasses with validation and JSON.

Runs everywhere: ComfyUI builds a `Job`, the agent and the workers read it back.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
MAX_GPUS = 64
MIXED_PRECISION = ("bf16", "fp16", "fp32")
ULYSSES_ENGINES = ("packed", "deepspeed")
SOLVERS = ("unipc", "dpm++", "euler")


class JobError(Exception):
    """A job that cannot be read, cannot run, or failed. The message is written for the user."""


def _check(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{field} is {value!r}; it must be {allowed}")


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _is_unicode(text: str) -> bool:
    # JSON's \ud800 and file names in other encodings become surrogates, which no file and no tokenizer takes.
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileIdentity:
    """One file as it was when the job was written."""

    path: str
    """Absolute path."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Modification time, nanoseconds."""

    def __post_init__(self) -> None:
        _check(Path(self.path).is_absolute() and "\0" not in self.path, "path", self.path, "an absolute path")
        _check(_is_unicode(self.path), "path", self.path, "a name in UTF-8; rename the file")

    @classmethod
    def of(cls, path: str | Path) -> FileIdentity:
        stat = Path(path).stat()
        return cls(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raises JobError if the file is gone or is no longer the one the job was written for."""
        try:
            now = FileIdentity.of(self.path)
        except OSError as error:
            raise JobError(f"{self.path} cannot be read: {error.strerror}") from error
        if now != self:
            raise JobError(
                f"{self.path} changed since the job was written: "
                f"{self.size} bytes then, {now.size} bytes now; queue the job again"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """The checkpoint's files. A sharded expert lists every shard."""

    high_noise: tuple[FileIdentity, ...]
    low_noise: tuple[FileIdentity, ...]
    vae: tuple[FileIdentity, ...]
    text_encoder: tuple[FileIdentity, ...] = ()
    """Empty when the embeddings travel with the job."""
    tokenizer: tuple[FileIdentity, ...] = ()
    """Tokenizer files beside the text encoder; empty when it carries its own `spiece_model`."""

    def __post_init__(self) -> None:
        for name in ("high_noise", "low_noise", "vae"):
            _check(len(getattr(self, name)) > 0, f"model.{name}", (), "at least one file")

    def all(self) -> tuple[FileIdentity, ...]:
        return tuple(part for field in dataclasses.fields(self) for part in getattr(self, field.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """How the job is spread over GPUs."""

    gpu_count: int
    """Processes, one per GPU (or per CPU process where there is no GPU)."""
    gpu_ids: tuple[str, ...] = ()
    """Physical GPU indices or UUIDs, one per process; empty on a machine without a GPU."""
    use_ulysses: bool = True
    """Split the sequence over the GPUs (Ulysses all-to-all attention)."""
    use_fsdp: bool = False
    """Shard the weights over the GPUs (FSDP2)."""
    offload_model: bool = False
    """The idle expert waits in pinned host memory."""
    memory_optimization: bool = False
    """Trade speed for peak memory: chunked feed-forward, no kept cross-attention keys and values."""
    torch_compile: bool = False
    """Compile the per-block segments around attention."""
    mixed_precision: str = "bf16"
    """Matrix products and attention; the residual, modulation and solver stay fp32."""
    ulysses_engine: str = "packed"
    """packed: one all-to-all in, one out. deepspeed: DeepSpeed's DistributedAttention."""
    master_port: int = 0
    """0: rendezvous through files, no port. Otherwise a TCP port on 127.0.0.1."""
    start_timeout: float = 600.0
    """Seconds until every rank must have joined and loaded."""
    stall_timeout: float = 600.0
    """Seconds without a sign of life from a rank after which the job is ended."""

    def __post_init__(self) -> None:
        _check(1 <= self.gpu_count <= MAX_GPUS, "gpu_count", self.gpu_count, f"1 to {MAX_GPUS}")
        _check(
            len(self.gpu_ids) in (0, self.gpu_count),
            "gpu_ids",
            self.gpu_ids,
            f"empty or one per GPU (gpu_count is {self.gpu_count})",
        )
        _check(len(set(self.gpu_ids)) == len(self.gpu_ids), "gpu_ids", self.gpu_ids, "without repeats")
        _check(
            self.mixed_precision in MIXED_PRECISION,
            "mixed_precision",
            self.mixed_precision,
            "one of " + ", ".join(MIXED_PRECISION),
        )
        _check(
            self.ulysses_engine in ULYSSES_ENGINES,
            "ulysses_engine",
            self.ulysses_engine,
            "one of " + ", ".join(ULYSSES_ENGINES),
        )
        _check(
            self.master_port == 0 or 1024 <= self.master_port <= 65535,
            "master_port",
            self.master_port,
            "0 (no port) or 1024 to 65535",
        )
        for name in ("start_timeout", "stall_timeout"):
            value = getattr(self, name)
            _check(_finite(value) and 1 <= value <= 86400, name, value, "1 to 86400 seconds")
        if self.gpu_count > 1 and not (self.use_ulysses or self.use_fsdp):
            raise ValueError(
                f"gpu_count is {self.gpu_count} with use_ulysses and use_fsdp both off: every GPU would compute "
                "the same video. Turn on use_ulysses (faster), use_fsdp (less memory per GPU), or set gpu_count to 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What is sampled."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    num_frames: int
    """4n + 1."""
    steps: int
    seed: int
    """For `torch.Generator("cpu")`; the same noise for every number of GPUs."""
    solver: str = "unipc"
    shift: float = 12.0
    guidance_low: float = 3.0
    """Guidance while the low-noise expert runs; 1 skips the unconditional pass."""
    guidance_high: float = 4.0
    """Guidance while the high-noise expert runs; 1 skips the unconditional pass."""
    boundary: float = 0.875
    """The high-noise expert runs while the timestep is at least `boundary` * 1000."""
    fps: float = 16.0

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            _check(16 <= value <= 8192, name, value, "16 to 8192")
        _check(
            1 <= self.num_frames <= 4097 and self.num_frames % 4 == 1,
            "num_frames",
            self.num_frames,
            f"4n + 1 (the nearest are {self.num_frames // 4 * 4 + 1 if self.num_frames > 0 else 1} "
            f"and {max(self.num_frames, 0) // 4 * 4 + 5})",
        )
        _check(1 <= self.steps <= 1000, "steps", self.steps, "1 to 1000")
        _check(0 <= self.seed < 2**64, "seed", self.seed, "0 to 2**64 - 1")
        _check(self.solver in SOLVERS, "solver", self.solver, "one of " + ", ".join(SOLVERS))
        _check(_finite(self.shift) and 0 < self.shift <= 100, "shift", self.shift, "over 0, at most 100")
        for name in ("guidance_low", "guidance_high"):
            value = getattr(self, name)
            _check(_finite(value) and 0 <= value <= 100, name, value, "0 to 100")
        _check(_finite(self.boundary) and 0 <= self.boundary <= 1, "boundary", self.boundary, "0 to 1")
        _check(_finite(self.fps) and 1 <= self.fps <= 240, "fps", self.fps, "1 to 240")


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Prompts to encode inside the job. Absent when `inputs.safetensors` holds the embeddings."""

    prompt: str
    negative_prompt: str = ""
    """Empty: the official default negative prompt."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            _check(len(value) <= 100_000, name, f"{len(value)} characters", "at most 100000")
            _check(_is_unicode(value), name, value[:50], "valid Unicode: it holds half of a character")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One video, self-contained: files, settings and, beside it, the input tensors."""

    id: str
    """Random, hexadecimal; the result must carry the same one."""
    model: ModelFiles
    parallel: Parallel
    sampling: Sampling
    text: Text | None = None
    warnings: tuple[str, ...] = ()
    """What the user is told in the status, such as a raised frame count."""
    verbose: bool = False
    """Workers log at DEBUG level."""
    version: int = VERSION

    def __post_init__(self) -> None:
        _check(self.version == VERSION, "version", self.version, str(VERSION))
        _check(0 < len(self.id) <= 64 and all(c in "0123456789abcdef" for c in self.id), "id", self.id, "hexadecimal")
        if self.text is not None:
            _check(len(self.model.text_encoder) > 0, "model.text_encoder", (), "given when the job encodes a prompt")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Reads what `to_json` wrote. Raises JobError naming the field that is missing, unknown or wrong."""
        try:
            return _build(cls, json.loads(text), "job.json")
        except (ValueError, RecursionError) as error:
            raise JobError(f"job.json is not a job this version can run: {error}") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type, strictly: no unknown keys, no coercion but int -> float."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return _build(typing.get_args(kind)[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {type(value).__name__}; it must be a list")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {type(value).__name__}; it must be an object")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"{where} has unknown fields {unknown[:5]}")
        required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        missing = sorted(required - set(value))
        if missing:
            raise ValueError(f"{where} lacks {missing[:5]}")
        return kind(**{name: _build(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}; it must be {kind.__name__}")
    return value
