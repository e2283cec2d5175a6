"""The files a job reads, as they were when it was written. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import JobError, check, is_unicode


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
        check(Path(self.path).is_absolute() and "\0" not in self.path, "path", self.path, "an absolute path")
        check(is_unicode(self.path), "path", self.path, "a name in UTF-8; rename the file")

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
class LoraFile:
    """A LoRA to merge into one expert."""

    file: FileIdentity
    strength: float
    """Factor of its change; may be negative."""

    def __post_init__(self) -> None:
        ok = math.isfinite(self.strength) and -100 <= self.strength <= 100
        check(ok, "strength", self.strength, "-100 to 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A checkpoint's files; a sharded expert lists every shard. A model of one transformer leaves one expert empty."""

    high_noise: tuple[FileIdentity, ...]
    low_noise: tuple[FileIdentity, ...]
    vae: tuple[FileIdentity, ...]
    text_encoder: tuple[FileIdentity, ...] = ()
    """Empty when the embeddings travel with the job."""
    tokenizer: tuple[FileIdentity, ...] = ()
    """Tokenizer files beside the text encoder; empty when it carries its own."""
    high_noise_loras: tuple[LoraFile, ...] = ()
    low_noise_loras: tuple[LoraFile, ...] = ()

    def __post_init__(self) -> None:
        check(len(self.vae) > 0, "model.vae", (), "at least one file")
        if not self.high_noise and not self.low_noise:
            raise ValueError("model.high_noise and model.low_noise are both empty; at least one must name a file")
        for name in ("high_noise", "low_noise"):
            if getattr(self, f"{name}_loras") and not getattr(self, name):
                raise ValueError(f"model.{name}_loras is given, but model.{name} is empty; it must name a file")

    @property
    def transformer(self) -> tuple[FileIdentity, ...]:
        """The files of one expert: both have the same sizes."""
        return self.high_noise or self.low_noise

    def all(self) -> tuple[FileIdentity, ...]:
        parts = (part for field in dataclasses.fields(self) for part in getattr(self, field.name))
        return tuple(part.file if isinstance(part, LoraFile) else part for part in parts)
