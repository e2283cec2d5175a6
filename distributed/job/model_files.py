"""The files a job reads, as they were when it was written."""

from __future__ import annotations

import dataclasses
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...wan.model.selection import EVERYTHING, Selection
from .errors import JobError, check, is_unicode

MAX_LORAS = 64
"""Per expert: each one's header is read before a job starts, and its weights while an expert loads."""
LoraSpec = tuple[str, float] | tuple[str, float, Selection]
"""(path, strength, which of a LoRA's changes; without it: all)."""
MAX_STRENGTH = 100
MAX_BLOCKS = 1000
"""Of a transformer; Wan's have 30 or 40."""
MAX_PARTS, MAX_PART = 64, 200
"""Of layers' names that a selection leaves out, and characters of each."""
MAX_FILES = 256
"""Of a checkpoint, a VAE or a text encoder: its shards. Released models have up to seven."""


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
        """Raises OSError if it is not there, ValueError if it is a folder, a pipe or a device."""
        found = Path(path).stat()
        check(stat.S_ISREG(found.st_mode), "path", str(path), "a regular file")
        return cls(path=str(path), size=found.st_size, mtime_ns=found.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raises JobError if the file is gone or is no longer the one the job was written for."""
        try:
            now = FileIdentity.of(self.path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise JobError(f"{self.path} cannot be read: {reason}") from error
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
    selection: Selection = EVERYTHING
    """Of its changes."""

    def __post_init__(self) -> None:
        blocks, without = self.selection.blocks, self.selection.without
        ok = len(blocks) <= MAX_BLOCKS and all(0 <= block < MAX_BLOCKS for block in blocks)
        check(ok, "blocks", blocks, f"at most {MAX_BLOCKS} numbers under {MAX_BLOCKS}")
        ok = len(without) <= MAX_PARTS and all(part and len(part) <= MAX_PART for part in without)
        check(ok, "without", without, f"at most {MAX_PARTS} parts of names, of 1 to {MAX_PART} characters")
        # NaN is not between anything.
        ok = -MAX_STRENGTH <= self.strength <= MAX_STRENGTH
        check(ok, "strength", self.strength, f"{-MAX_STRENGTH} to {MAX_STRENGTH}")


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """What an expert is made from."""

    files: tuple[FileIdentity, ...]
    loras: tuple[LoraFile, ...]
    side: str | None
    """Which of the changes counts in a LoRA file that has those of both experts."""

    @property
    def paths(self) -> list[str]:
        return [file.path for file in self.files]

    @property
    def specs(self) -> list[LoraSpec]:
        """Of the LoRAs."""
        return [(lora.file.path, lora.strength, lora.selection) for lora in self.loras]

    def check_unchanged(self) -> None:
        """After they were read: a file that is replaced meanwhile gives a model of both. Raises JobError naming it."""
        for file in (*self.files, *(lora.file for lora in self.loras)):
            file.check_unchanged()

    @property
    def loras_are_there(self) -> bool:
        """Their files, still the same."""
        with suppress(JobError):
            for lora in self.loras:
                lora.file.check_unchanged()
            return True
        return False


def check_loras(name: str, count: int) -> None:
    """Raises ValueError if one expert has more LoRAs than a job takes."""
    if count > MAX_LORAS:
        raise ValueError(f"{name} holds {count} LoRAs; it must hold at most {MAX_LORAS} LoRAs per expert")


def check_files(name: str, count: int) -> None:
    """Raises ValueError if one model has more files than a job takes."""
    check(count <= MAX_FILES, name, count, f"at most {MAX_FILES} files")


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
    clip_vision: tuple[FileIdentity, ...] = ()
    """Empty when the model looks at no picture, or its features travel with the job."""

    def __post_init__(self) -> None:
        check(len(self.vae) > 0, "model.vae", (), "at least one file")
        for field in dataclasses.fields(self):
            count = len(getattr(self, field.name))
            if field.name.endswith("_loras"):
                check_loras(f"model.{field.name}", count)
            else:
                check_files(f"model.{field.name}", count)
        if not self.high_noise and not self.low_noise:
            raise ValueError("model.high_noise and model.low_noise are both empty; at least one must name a file")
        for name in ("high_noise", "low_noise"):
            if getattr(self, f"{name}_loras") and not getattr(self, name):
                raise ValueError(f"model.{name}_loras is given, but model.{name} is empty; it must name a file")

    @property
    def transformer(self) -> tuple[FileIdentity, ...]:
        """The files of one expert: both have the same sizes."""
        return self.high_noise or self.low_noise

    def expert(self, name: str) -> ExpertFiles:
        """high_noise or low_noise."""
        return ExpertFiles(getattr(self, name), getattr(self, f"{name}_loras"), name)

    def all(self) -> tuple[FileIdentity, ...]:
        parts = (part for field in dataclasses.fields(self) for part in getattr(self, field.name))
        return tuple(part.file if isinstance(part, LoraFile) else part for part in parts)
