"""What the files of one model hold, without reading a weight. Standard library only: runs before any process."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .headers import TensorInfo, describe_file, read_header

PTH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
"""Of PyTorch's own zip format."""
MAX_INDEX_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """The tensors of one model, over all of its files."""

    label: str
    """The files, for messages."""
    names: frozenset[str]
    tensors: dict[str, TensorInfo] | None
    """None if a file is a .pth, whose shapes only torch can read."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        return None if self.tensors is None else {name: info.shape for name, info in self.tensors.items()}


def weight_files(files: Sequence[str | Path], expected: str) -> list[Path]:
    """The files that hold tensors: all but JSON. ValueError if there is none."""
    paths = [Path(file) for file in files]
    weights = [path for path in paths if path.suffix.lower() != ".json"]
    if not weights:
        raise ValueError(f"{', '.join(map(str, paths)) or 'no file'} given; expected {expected}")
    return weights


def read_index(files: Sequence[str | Path], expected: str) -> ModelIndex:
    """Reads the headers of one model's files.

    Args:
        files: one file, or every shard; .safetensors or PyTorch checkpoints. JSON files are ignored.
        expected: what the caller wants, for messages.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    paths = weight_files(files, expected)
    names: set[str] = set()
    tensors: dict[str, TensorInfo] | None = {}
    try:
        for path in paths:
            if path.suffix.lower() in PTH_SUFFIXES:
                names |= read_pth_names(path)
                tensors = None
            elif path.suffix.lower() == ".safetensors":
                header = read_header(path).tensors
                names |= header.keys()
                if tensors is not None:
                    tensors |= header
            else:
                raise ValueError(f"{path} is {describe_file(path)}, not a .safetensors or .pth file")
    except ValueError as error:
        raise ValueError(f"{error}; expected {expected}") from error
    return ModelIndex(", ".join(map(str, paths)), frozenset(names), tensors)


def read_pth_names(path: str | Path) -> set[str]:
    """The strings in a PyTorch zip checkpoint's index, tensor names among them; nothing is unpickled.

    Raises:
        ValueError: the file cannot be read, is truncated, or is not such a checkpoint.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if not is_zip:
            raise ValueError(f"{path} is not a PyTorch checkpoint: it is {describe_file(path)}")
        with zipfile.ZipFile(path) as archive:
            index = [entry for entry in archive.infolist() if entry.filename.split("/")[1:] == ["data.pkl"]]
            if not index or index[0].file_size > MAX_INDEX_BYTES:
                raise ValueError(f"{path} is not a PyTorch checkpoint: it is a zip archive without data.pkl")
            text = archive.read(index[0])
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is a truncated or damaged PyTorch checkpoint: {error}") from error
    try:
        return {argument for _, argument, _ in pickletools.genops(io.BytesIO(text)) if isinstance(argument, str)}
    except ValueError as error:
        raise ValueError(f"{path} is a damaged PyTorch checkpoint: {error}") from error
