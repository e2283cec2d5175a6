"""The job: everything a run needs, as frozen dataclasses with validation and JSON.

Runs everywhere: ComfyUI builds a `Job`, the agent and the workers read it back.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

from .errors import JobError, check, check_text
from .model_files import FileIdentity, LoraFile, ModelFiles
from .sampling import Sampling
from .setting import check_settings, choice, number
from .switches import MAX_GPUS, Switches

VERSION = 3
__all__ = [
    "FFN_CHUNK",
    "MAX_GPUS",
    "VERSION",
    "FileIdentity",
    "Job",
    "JobError",
    "LoraFile",
    "ModelFiles",
    "Parallel",
    "Sampling",
    "Text",
]
"""A job's parts are imported from here; model_files.py, sampling.py and switches.py hold the larger ones."""

MAX_PROMPT = 100_000
"""Characters; the text encoder reads 512 tokens."""
_GPU_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9./_-]{0,99}", re.ASCII)
"""An index, a UUID or a MIG slice, as CUDA_VISIBLE_DEVICES takes them."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)
FFN_CHUNK = 4096
"""Tokens per feed-forward call under `memory_optimization`: large enough to keep a GPU busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel(Switches):
    """How the job is spread over GPUs."""

    gpu_count: int = number(None, 1, MAX_GPUS)
    """Processes, one per GPU (or per CPU process where there is no GPU)."""
    gpu_ids: tuple[str, ...] = ()
    """Physical GPU indices or UUIDs, one per process of a machine; empty on a machine without a GPU."""
    cfg_parallel: bool = False
    """Half of the GPUs compute what the prompt asks for, half what the negative prompt does, at the same time."""
    gather: str = choice("block", ("block", "expert"))
    """What FSDP gathers: block: one block at a time; expert: a whole one, kept until the other expert takes over."""
    hosts: tuple[str, ...] = ()
    """Machines, as ssh takes their names, with equally many of the processes each; empty: this one."""
    more_follow: bool = False
    """Further videos of a batch: the processes stay for them, and after the last one for `keep_warm_seconds`."""

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_hosts()
        check(
            len(self.gpu_ids) in (0, self.gpus_per_host),
            "gpu_ids", self.gpu_ids, f"empty or one per GPU of a machine ({self.gpus_per_host})",
        )  # fmt: skip
        for gpu in self.gpu_ids:
            check(_GPU_ID.fullmatch(gpu) is not None, "gpu_ids", gpu, "indices of nvidia-smi or UUIDs")
        check(len(set(self.gpu_ids)) == len(self.gpu_ids), "gpu_ids", self.gpu_ids, "without repeats")
        check(
            self.linear_precision == "full" or self.mixed_precision == "bf16",
            "linear_precision", self.linear_precision, f"'full' with mixed_precision {self.mixed_precision}",
        )  # fmt: skip
        check(
            self.kernels != "triton" or not self.torch_compile,
            "kernels", self.kernels, "'auto' or 'plain' with torch_compile, which makes kernels of its own",
        )  # fmt: skip
        check(
            not (self.stream_blocks and self.use_fsdp and self.gpu_count > 1),
            "stream_blocks", self.stream_blocks, "off with use_fsdp: every GPU streams whole blocks",
        )  # fmt: skip
        check(
            not self.cfg_parallel or self.gpu_count % 2 == 0,
            "cfg_parallel", self.cfg_parallel, f"off with an odd number of GPUs (gpu_count is {self.gpu_count})",
        )  # fmt: skip
        if self.ulysses_size > 1 and not (self.use_ulysses or self.use_fsdp):
            raise ValueError(
                f"gpu_count is {self.gpu_count} with use_ulysses and use_fsdp both off: every GPU would compute "
                "the same video. Turn on use_ulysses (faster), use_fsdp (less memory per GPU), or set gpu_count to 1"
            )

    def _check_hosts(self) -> None:
        for name in self.hosts:
            # As an argument of ssh and pdsh: no option, no list, no user.
            check(_HOST.fullmatch(name) is not None, "hosts", name, "names or IPv4 addresses of machines")
        check(len(set(self.hosts)) == len(self.hosts), "hosts", self.hosts, "without repeats")
        if not self.hosts:
            return
        count = len(self.hosts)
        check(self.gpu_count % count == 0, "gpu_count", self.gpu_count, f"a multiple of the {count} hosts")
        seconds = self.keep_warm_seconds
        check(seconds == 0, "keep_warm_seconds", seconds, "0 with several machines: their processes end with the job")
        check(not self.more_follow, "more_follow", True, "off with several machines: their processes end with the job")

    @property
    def gpus_per_host(self) -> int:
        """Processes on each machine."""
        return self.gpu_count // max(1, len(self.hosts))

    @property
    def stays(self) -> bool:
        """The processes wait for another job."""
        return self.more_follow or self.keep_warm_seconds > 0

    @property
    def parks_experts(self) -> bool:
        """The idle expert leaves the GPU."""
        return self.offload_model or self.stream_blocks

    @property
    def cfg_size(self) -> int:
        """Groups of GPUs that work on different prompts."""
        return 2 if self.cfg_parallel else 1

    @property
    def ulysses_size(self) -> int:
        """GPUs that share one sequence."""
        return self.gpu_count // self.cfg_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Prompts to encode inside the job. Absent when `inputs.safetensors` holds the embeddings."""

    prompt: str
    negative_prompt: str = ""
    """Empty: the official default negative prompt."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            check_text(name, value, MAX_PROMPT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One video, self-contained: files, settings and, beside it, the input tensors."""

    id: str
    """Random, hexadecimal; the result must carry the same one."""
    model: ModelFiles
    parallel: Parallel
    sampling: Sampling
    text: Text | None = None
    decode: bool = True
    """Off: only the latents are kept, no video is made."""
    preview: bool = False
    """Show while it is sampled what the video is going to be."""
    warnings: tuple[str, ...] = ()
    """What the user is told in the status, such as a raised frame count."""
    verbose: bool = False
    """Workers log at DEBUG level."""
    version: int = VERSION

    def __post_init__(self) -> None:
        check(self.version == VERSION, "version", self.version, str(VERSION))
        check(0 < len(self.id) <= 64 and all(c in "0123456789abcdef" for c in self.id), "id", self.id, "hexadecimal")
        if self.text is not None:
            check(len(self.model.text_encoder) > 0, "model.text_encoder", (), "given when the job encodes a prompt")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Reads what `to_json` wrote. Raises JobError naming the field that is missing, unknown or wrong."""
        try:
            job: Job = _build(cls, json.loads(text), "job.json")
        except (ValueError, RecursionError) as error:
            raise JobError(f"job.json is not a job this version can run: {error}") from error
        return job


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
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
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
