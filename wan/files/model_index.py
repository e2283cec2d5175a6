"""What the files of one model hold, without reading a weight."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .headers import MAX_NAME_LENGTH, HeadersTogether, TensorInfo, brief, describe_file, read_header
from .quant_formats import quant_formats
from .regular_files import regular

if TYPE_CHECKING:
    from .gguf_files import GgufFile

GGUF_SUFFIX = ".gguf"
PTH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
"""Of PyTorch's own zip format."""
MAX_INDEX_BYTES = 1 << 20
"""Of a .pth's list of tensors; 14B's 1,095 take a fifth of it, umT5's 242 a twentieth."""
MAX_OPCODES = 1 << 18
"""Of the pickle that is that list; 14B's has 50,000."""
MAX_DIRECTORY_BYTES = 1 << 20
"""Of a .pth's directory of storages; 14B's takes a tenth of it."""

_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, struct.error)
"""What the library raises for a damaged archive."""


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """The tensors of one model, over all of its files."""

    label: str
    """The files, for messages."""
    names: frozenset[str]
    tensors: dict[str, TensorInfo] | None
    """None if the files are .pth, whose shapes only torch can read."""
    formats: dict[str, str] = field(default_factory=dict)
    """Layer -> the quantised format that the file says it is stored in."""
    gguf: GgufFile | None = None
    """The last GGUF file among them."""

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
        files: one file, or every shard; .safetensors, .gguf or PyTorch checkpoints. JSON files are ignored.
        expected: what the caller wants, for messages.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    paths = weight_files(files, expected)
    pickles = [path for path in paths if path.suffix.lower() in PTH_SUFFIXES]
    if 0 < len(pickles) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))} are files of different formats; expected {expected}")
    names: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    formats: dict[str, str] = {}
    gguf = None
    together = HeadersTogether()
    try:
        for path in paths:
            suffix = path.suffix.lower()
            if suffix in PTH_SUFFIXES:
                # Every string of a pickle: some, such as "cpu", are in each file.
                names |= dict.fromkeys(read_pth_names(path), path)
                continue
            if suffix == GGUF_SUFFIX:
                gguf = open_gguf(path)
                together.add(path, gguf.header_bytes, len(gguf.tensors))
                found = {
                    name: TensorInfo(tensor.type_name, tensor.shape, tensor.offset, tensor.offset + tensor.nbytes)
                    for name, tensor in gguf.tensors.items()
                }
            elif suffix == ".safetensors":
                header = read_header(path)
                together.add(path, header.nbytes, len(header.tensors))
                found = header.tensors
                formats |= quant_formats(path, header)
            else:
                raise ValueError(f"{path} is {describe_file(path)}, not a .safetensors, .gguf or .pth file")
            for name in found:
                if name in names:
                    raise ValueError(f"{path}: tensor {name} is also in {names[name]}")
                names[name] = path
            tensors |= found
    except ValueError as error:
        raise ValueError(f"{error}; expected {expected}") from error
    return ModelIndex(", ".join(map(str, paths)), frozenset(names), None if pickles else tensors, formats, gguf)


def open_gguf(path: Path) -> GgufFile:
    """Reads a GGUF file's header. ValueError naming the file, or the package that is missing."""
    # Not at the top: it imports torch, which nothing else here needs.
    from .gguf_files import GgufFile

    return GgufFile(path)


def read_pth_names(path: str | Path) -> set[str]:
    """The strings in a PyTorch zip checkpoint's index, tensor names among them; nothing is unpickled.

    Raises:
        ValueError: the file cannot be read, is truncated, or is not such a checkpoint.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=regular) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not is_zip:
        raise ValueError(f"{path} is not a PyTorch checkpoint: it is {describe_file(path)}")
    index = _pth_index(path)
    if index is None:
        raise ValueError(f"{path} is not a PyTorch checkpoint: it is a zip archive without a plain data.pkl")
    try:
        strings = set()
        for count, (_, argument, _) in enumerate(pickletools.genops(io.BytesIO(index))):
            if count >= MAX_OPCODES:
                raise ValueError(f"its list of tensors takes over {MAX_OPCODES} steps to build")
            if isinstance(argument, str):
                strings.add(argument)
    except ValueError as error:
        raise ValueError(f"{path} is a damaged PyTorch checkpoint: {brief(error)}") from error
    return {text for text in strings if len(text) <= MAX_NAME_LENGTH and text.isprintable()}


def _pth_index(path: Path) -> bytes | None:
    """The pickle that lists the tensors; None for another kind of archive."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(bounded := _BoundedFile(file, MAX_DIRECTORY_BYTES)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.split("/")[1:] == ["data.pkl"]]
            # PyTorch stores it uncompressed: no archive makes more of it than the file has bytes.
            if not entries or entries[0].compress_type != zipfile.ZIP_STORED:
                return None
            if entries[0].file_size > MAX_INDEX_BYTES:
                raise ValueError(
                    f"its list of tensors takes {entries[0].file_size} bytes; at most {MAX_INDEX_BYTES} are allowed"
                )
            # The entry's own head comes before it.
            bounded.left = MAX_INDEX_BYTES + (1 << 17)
            return archive.read(entries[0])
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is a truncated or damaged PyTorch checkpoint: {brief(error)}") from error


class _BoundedFile:
    """A file of which only so many bytes are read: zipfile itself takes in a directory of any size."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self.left = self._limit = limit
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"its directory takes over {self._limit} bytes")
        return data
