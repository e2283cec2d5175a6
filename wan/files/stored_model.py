"""The files of one model -> name -> stored tensor. Headers only, each read once while its file stays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .headers import HeadersTogether, TensorInfo, brief, describe_file, read_header
from .pth_files import read_pth
from .quant_formats import QuantFormat, quant_formats
from .regular_files import read_range, regular

if TYPE_CHECKING:
    from .gguf_files import GgufFile
    from .stored_tensor import StoredTensor

GGUF_SUFFIX = ".gguf"
PTH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
"""Of PyTorch's own zip format."""
KEPT_HEADERS = 160
"""Files whose headers are kept: both experts, their LoRAs, VAE and text encoder."""


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """One file's header."""

    path: str
    tensors: Mapping[str, TensorInfo]
    nbytes: int
    """Of the header itself."""
    formats: Mapping[str, QuantFormat] = field(default_factory=dict)
    """Layer -> the quantised format that the file says it is stored in."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file."""
    gguf: GgufFile | None = None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The tensors of one model, over all of its files."""

    files: tuple[OpenedFile, ...]
    tensors: Mapping[str, TensorInfo]
    holders: Mapping[str, OpenedFile]
    """Tensor name -> its file."""

    @property
    def label(self) -> str:
        """The file, or the folder of a model in shards, for messages."""
        return self.files[0].path if len(self.files) == 1 else str(Path(self.files[0].path).parent)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def formats(self) -> dict[str, QuantFormat]:
        return {layer: kind for file in self.files for layer, kind in file.formats.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """Of all safetensors files among them; the first one's where they differ."""
        return {key: value for file in reversed(self.files) for key, value in file.metadata.items()}

    @property
    def gguf(self) -> GgufFile | None:
        """The first GGUF file among them, which has the metadata of all."""
        return next((file.gguf for file in self.files if file.gguf is not None), None)

    def weights(self, names: Mapping[str, str]) -> dict[str, StoredTensor]:
        """What is to be read: quantised weights with their scales, without what only describes them.

        Args:
            names: tensor name -> what it is called in what is returned; other tensors are left out.
        Raises:
            ValueError: a format cannot be turned back into floats, or a scale fits no weight.
        """
        # Not at the top: it imports torch, which checks by names and shapes do without.
        from .quantised import paired_weights

        return paired_weights(self, names)

    def read_bytes(self, name: str) -> bytes:
        """A tensor that is no numbers. Raises ValueError if it cannot be read."""
        info, path = self.tensors[name], self.holders[name].path
        data = bytearray(info.end - info.start)
        try:
            with open(path, "rb", opener=regular) as file:
                read_range(file.fileno(), memoryview(data), info.start, path)
        except OSError as error:
            raise ValueError(f"{path}: tensor {name} cannot be read: {brief(error)}") from error
        return bytes(data)


def open_model(files: Sequence[str | Path], expected: str) -> StoredModel:
    """Reads the headers of one model's files.

    Args:
        files: one file, or every shard; .safetensors, .gguf or PyTorch checkpoints. JSON files are ignored.
        expected: what the caller wants, for messages.
    Raises:
        ValueError: naming the file, what it is, and what was expected.
    """
    paths = [str(file) for file in files if Path(file).suffix.lower() != ".json"]
    if not paths:
        raise ValueError(f"{', '.join(map(str, files)) or 'no file'} given; expected {expected}")
    opened: list[OpenedFile] = []
    holders: dict[str, OpenedFile] = {}
    together = HeadersTogether()
    try:
        for path in paths:
            file = open_file(path)
            together.add(path, file.nbytes, len(file.tensors))
            for name in file.tensors:
                if holders.setdefault(name, file) is not file:
                    raise ValueError(f"{path}: tensor {name} is also in {holders[name].path}")
            opened.append(file)
    except ValueError as error:
        raise ValueError(f"{error}; expected {expected}") from error
    tensors = {name: info for file in opened for name, info in file.tensors.items()}
    return StoredModel(tuple(opened), tensors, holders)


def open_file(path: str) -> OpenedFile:
    """One file's header. Raises ValueError naming the file and what it is."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _open_file(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


# Of the file as it is now, told by what follows its path: a job asks for the same header many times.
@lru_cache(maxsize=KEPT_HEADERS)
def _open_file(path: str, *identity: int) -> OpenedFile:
    suffix = Path(path).suffix.lower()
    if suffix in PTH_SUFFIXES:
        tensors, nbytes = read_pth(path)
        return OpenedFile(path, _usual(tensors), nbytes)
    if suffix == GGUF_SUFFIX:
        from .gguf_files import GgufFile

        gguf = GgufFile(path)
        tensors = {
            name: TensorInfo(tensor.type_name, tensor.shape, tensor.offset, tensor.offset + tensor.nbytes)
            for name, tensor in gguf.tensors.items()
        }
        return OpenedFile(path, tensors, gguf.header_bytes, gguf=gguf)
    if suffix != ".safetensors":
        raise ValueError(f"{path} is {describe_file(path)}, not a .safetensors, .gguf or .pth file")
    try:
        with open(path, "rb", opener=regular) as file:
            header = read_header(path, file)
            formats = {_usual_name(layer): kind for layer, kind in quant_formats(path, header, file).items()}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return OpenedFile(path, _usual(header.tensors), header.nbytes, formats, header.metadata)


_SPELLINGS = (
    # quanto, which keeps a weight's codes and scale as parts of it.
    (".weight._data", ".weight"),
    (".weight._scale", ".weight_scale"),
    # torchao.
    ("._weight_qdata", ".weight"),
    ("._weight_scale", ".weight_scale"),
    ("._weight_zero_point", ".weight_zero_point"),
)
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into the names of modules that are compiled, sharded or checkpointed."""


def _usual_name(name: str) -> str:
    """Of a tensor or a layer, without torch's wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _usual(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """By the names that all others write. Raises ValueError if two become one."""
    renamed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        usual = _usual_name(name)
        for ending, plain in _SPELLINGS:
            if usual.endswith(ending):
                usual = usual.removesuffix(ending) + plain
        if usual in renamed:
            raise ValueError(f"tensor {usual} stands there in two spellings")
        renamed[usual] = info
    return renamed
