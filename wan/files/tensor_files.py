"""The tensors of one model's files, read one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .gguf_files import GgufFile
from .headers import TensorInfo, brief
from .model_index import GGUF_SUFFIX, PTH_SUFFIXES, open_gguf, read_index, weight_files

_PTH_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}
_PIECE = 16 << 20
"""Elements that are unpacked to float32 at once: 64 MiB, where umT5-xxl's embedding would take 4 GiB."""


class TensorFiles:
    """Names, shapes and dtypes of a model's tensors; a tensor is read when it is asked for.

    Args:
        files: one file, or every shard; .safetensors, .gguf or PyTorch checkpoints. JSON files are ignored.
        expected: what the caller wants, for messages.
    Raises:
        ValueError: a file cannot be read, or is something else.
    """

    def __init__(self, files: Sequence[str | Path], *, expected: str) -> None:
        index = read_index(files, expected)
        self._sources: dict[str, GgufFile | safe_open | Mapping[str, Tensor]] = {}
        tensors = dict(index.tensors or {})
        for path in weight_files(files, expected):
            if path.suffix.lower() in PTH_SUFFIXES:
                loaded = _load_pth(path, expected)
                self._sources |= dict.fromkeys(loaded, loaded)
                tensors |= {
                    name: TensorInfo(_PTH_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, 0)
                    for name, tensor in loaded.items()
                }
            elif path.suffix.lower() == GGUF_SUFFIX:
                gguf = open_gguf(path)
                self._sources |= dict.fromkeys(gguf.tensors, gguf)
            else:
                try:
                    source = safe_open(path, framework="pt")
                    self._sources |= dict.fromkeys(source.keys(), source)
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{path} cannot be read: {error}; expected {expected}") from error
        self.index = dataclasses.replace(index, names=frozenset(tensors), tensors=tensors)
        """With the sizes of a .pth, too; its offsets mean nothing."""
        self.shapes = {name: info.shape for name, info in tensors.items()}

    @property
    def label(self) -> str:
        """The files, for messages."""
        return self.index.label

    def read(self, name: str) -> Tensor:
        """One tensor of another file than a GGUF on the CPU, backed by the file where the system allows it."""
        source = self._sources[name]
        try:
            return source[name] if isinstance(source, Mapping) else source.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.label}: tensor {name} cannot be read: {brief(error)}") from error

    def read_as(self, name: str, dtype: torch.dtype, device: torch.device | str, *, scale: str | None = None) -> Tensor:
        """One tensor, cast and moved; what needs unpacking or scaling is float32 only piece by piece.

        Args:
            scale: name of the number, or of the column with one number per row, that the values are multiplied by.
        """
        source = self._sources[name]
        if scale is None and not isinstance(source, GgufFile):
            return self.read(name).to(device).to(dtype)
        shape = self.shapes[name]
        out = torch.empty(shape, dtype=dtype, device=device)
        rows = out.view(shape[0], math.prod(shape[1:]))
        stored = None if isinstance(source, GgufFile) else self.read(name).view(rows.shape)
        factors = None if scale is None else self.read(scale).to(device, torch.float32).view(-1, 1)
        step = max(_PIECE // max(rows.shape[1], 1), 1)
        for first in range(0, rows.shape[0], step):
            piece = rows[first : first + step]
            if isinstance(source, GgufFile):
                piece.copy_(self._unpack(source, name, first * rows.shape[1], piece.numel()).view(piece.shape))
                continue
            values = stored[first : first + step].to(device).to(torch.float32)
            piece.copy_(values.mul_(factors if len(factors) == 1 else factors[first : first + step]))
        return out

    def _unpack(self, source: GgufFile, name: str, start: int, count: int) -> Tensor:
        try:
            return source.read_flat(name, start, count)
        except OSError as error:
            raise ValueError(f"{self.label}: tensor {name} cannot be read: {brief(error)}") from error


def fill(
    model: nn.Module,
    files: TensorFiles,
    source: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    scales: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Gives a model built on the meta device its weights: each is read, cast and moved alone.

    Args:
        source: parameter name of the model -> tensor name in the files, for every parameter.
        scales: tensor name -> name of the number or column that its values are multiplied by.
        check: called before each tensor; what it raises ends the reading.
    Raises:
        ValueError: a tensor has another shape than the model's.
    """
    weights: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for parameter, meta in model.state_dict().items():
        name = source[parameter]
        if files.shapes[name] != tuple(meta.shape):
            raise ValueError(
                f"{files.label}: tensor {name} has shape {list(files.shapes[name])}; "
                f"the sizes of its other tensors call for {list(meta.shape)}"
            )
        if name not in read:
            check()
            read[name] = files.read_as(name, dtype, device, scale=(scales or {}).get(name))
        weights[parameter] = read[name]
    # assign: the parameters become these very tensors, whatever dtype the library would prefer for them.
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()


def _load_pth(path: Path, expected: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Whatever a damaged or foreign file makes the unpickler raise, the user is told which file it was.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint: {reason}; expected {expected}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} instead of named tensors; expected {expected}")
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
