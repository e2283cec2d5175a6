"""PyTorch's zip checkpoints: where each tensor's bytes are. The pickle that lists them is interpreted, never executed.

A checkpoint is a zip archive, stored without compression, of `data.pkl` and one file of bytes per storage
(https://github.com/pytorch/pytorch/blob/main/docs/source/notes/serialization.rst).
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .headers import DTYPE_BITS, MAX_DIMS, TensorInfo, brief, check_count, check_name, describe_file
from .regular_files import read_range, regular

MAX_INDEX_BYTES = 1 << 20
"""Of a .pth's list of tensors; 14B's 1,095 take a fifth of it, umT5's 242 a twentieth."""
MAX_OPCODES = 1 << 18
"""Of the pickle that is that list; 14B's has 50,000."""
MAX_DIRECTORY_BYTES = 1 << 20
"""Of a .pth's directory of storages; 14B's takes a tenth of it."""

_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, struct.error)
"""What the library raises for a damaged archive."""
_STORAGES = {"Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Char": "I8", "Byte": "U8",
             "Long": "I64", "Int": "I32", "Short": "I16", "Bool": "BOOL"}  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "uint8": "U8",
           "int64": "I64", "int32": "I32", "int16": "I16", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
           "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"}  # fmt: skip
_LOCAL_HEAD = struct.Struct("<26xHH")
"""Before each file's bytes: the lengths of its name and of what else stands there."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    """None: bytes, whose meaning the tensor knows."""
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a list of stack entries begins."""


def read_pth(path: str | Path) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a checkpoint by name, and the bytes of its list of them.

    Raises:
        ValueError: the file cannot be read, is truncated, or is not such a checkpoint of named tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=regular) as file:
            if file.read(4) != b"PK\x03\x04":
                raise ValueError(f"{path} is not a PyTorch checkpoint: it is {describe_file(path)}")
            try:
                return _read(path, file)
            except _ZIP_ERRORS as error:
                raise ValueError(f"{path} is a truncated or damaged PyTorch checkpoint: {brief(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path, file: BinaryIO) -> tuple[dict[str, TensorInfo], int]:
    with zipfile.ZipFile(bounded := _BoundedFile(file, MAX_DIRECTORY_BYTES)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        lists = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        # PyTorch stores it uncompressed: no archive makes more of it than the file has bytes.
        if not lists or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError(f"{path} is a zip archive without a plain data.pkl")
        index = entries[lists[0]]
        if index.file_size > MAX_INDEX_BYTES:
            raise ValueError(
                f"its list of tensors takes {index.file_size} bytes; at most {MAX_INDEX_BYTES} are allowed"
            )
        folder = lists[0].removesuffix("data.pkl")
        # The entry's own head comes before it.
        bounded.left = MAX_INDEX_BYTES + (1 << 17)
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in entries else b"little"
        if order != b"little":
            raise ValueError(f"its numbers have the byte order {brief(order)}; it must be little")
        listed = interpret(archive.read(index))
    if not isinstance(listed, dict):
        raise ValueError("it holds something else than named tensors")
    tensors = _named_tensors(listed)
    check_count(len(tensors))
    placed = {
        check_name(name): _place(name, tensor, entries.get(f"{folder}data/{tensor.storage.key}"), file)
        for name, tensor in tensors.items()
    }
    return placed, index.file_size


def _named_tensors(listed: dict[str, Any]) -> dict[str, _Tensor]:
    """Of the list itself, or of the one in it: trainers put it beside their steps, as "state_dict" or "model"."""

    def named(values: dict[str, Any]) -> dict[str, _Tensor]:
        return {name: value for name, value in values.items() if isinstance(value, _Tensor)}

    inner = {name: found for name, value in listed.items() if isinstance(value, dict) and (found := named(value))}
    if named(listed) or not inner:
        return named(listed)
    if len(inner) > 1:
        raise ValueError(
            f"it holds several lists of tensors ({', '.join(map(brief, inner))}); save one of them by itself"
        )
    return next(iter(inner.values()))


def _place(name: str, tensor: _Tensor, entry: zipfile.ZipInfo | None, file: BinaryIO) -> TensorInfo:
    if entry is None:
        raise ValueError(f"the bytes of tensor {name!r} are missing")
    head = bytearray(30)
    read_range(file.fileno(), memoryview(head), entry.header_offset, "it")
    start = entry.header_offset + 30 + sum(_LOCAL_HEAD.unpack(head))
    size = DTYPE_BITS[tensor.dtype] // 8
    count = math.prod(tensor.shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) if count else 0
    if (tensor.offset + span) * size > entry.file_size:
        raise ValueError(f"tensor {name!r} needs {(tensor.offset + span) * size} bytes; {entry.file_size} are there")
    first = start + tensor.offset * size
    # A size of one has a stride without meaning.
    steps = [(n, stride) for n, stride in zip(tensor.shape, tensor.strides, strict=True) if n != 1]
    contiguous = all(stride == math.prod(n for n, _ in steps[i + 1 :]) for i, (_, stride) in enumerate(steps))
    return TensorInfo(
        tensor.dtype, tensor.shape, first, first + span * size, None if contiguous or not count else tensor.strides
    )


def interpret(index: bytes) -> Any:
    """What a pickle of named tensors says. Only what such a list needs is understood, and nothing is called.

    Raises:
        ValueError: it says something else, or more than a bound.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(index))):
            if count >= MAX_OPCODES:
                raise ValueError(f"its list of tensors takes over {MAX_OPCODES} steps to build")
            if opcode.name == "STOP":
                return stack[-1]
            _step(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its list of tensors is damaged ({type(error).__name__})") from error
    raise ValueError("its list of tensors has no end")


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list, "MARK": _Mark}


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _LITERALS:
        stack.append(argument)
    elif name in _VALUES:
        stack.append(_VALUES[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_Global(argument))
    elif name == "STACK_GLOBAL":
        module, attribute = _pop(stack, 2)
        stack.append(_Global(f"{module} {attribute}"))
    elif name == "TUPLE":
        stack.append(tuple(_pop_marked(stack)))
    elif name in _TUPLES:
        stack.append(tuple(_pop(stack, _TUPLES[name])))
    elif name in ("SETITEM", "SETITEMS"):
        items = _pop(stack, 2) if name == "SETITEM" else _pop_marked(stack)
        if len(items) % 2:
            raise KeyError(items[-1])
        if isinstance(stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            # Other keys, of nested lists for example, are none of tensors.
            stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))
    elif name in ("APPEND", "APPENDS", "ADDITEMS"):
        _pop(stack, 1) if name == "APPEND" else _pop_marked(stack)
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name in ("REDUCE", "NEWOBJ"):
        function, arguments = _pop(stack, 2)
        stack.append(_made(function, arguments))
    elif name == "BUILD":
        stack.pop()
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"its list of tensors holds the step {name}, which no list of tensors needs")


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError
    popped = stack[-count:]
    del stack[-count:]
    return popped


def _pop_marked(stack: list[Any]) -> list[Any]:
    popped = []
    while not isinstance(entry := stack.pop(), _Mark):
        popped.append(entry)
    return popped[::-1]


def _storage(what: Any) -> _Storage:
    kind, storage, key, *_ = what
    if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str):
        raise ValueError("its list of tensors refers to something else than a storage")
    name = storage.name.rpartition(" ")[2].removesuffix("Storage")
    return _Storage(_STORAGES.get(name), key)


def _made(function: Any, arguments: Any) -> Any:
    """What a call would give: a tensor or an empty dictionary; ValueError for all else."""
    name = function.name if isinstance(function, _Global) else ""
    if name == "collections OrderedDict":
        return {}
    if name == "torch._utils _rebuild_parameter":
        return arguments[0]
    if name not in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"):
        raise ValueError(f"its list of tensors calls {brief(name)}, which no list of tensors needs")
    storage, offset, shape, strides, _, _, *rest = arguments
    dtype = storage.dtype if isinstance(storage, _Storage) else None
    if name.endswith("v3") and rest and isinstance(rest[0], _Global):
        dtype = _DTYPES.get(rest[0].name.rpartition(" ")[2])
    sizes = (offset, *shape, *strides)
    if dtype is None or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError("it holds a tensor of an unknown dtype or with sizes that are none")
    if len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise ValueError(f"it holds a tensor of {len(shape)} sizes and {len(strides)} strides")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


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

    def close(self) -> None:
        """The file is closed by who opened it."""
