"""The tensors of one model's files, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .model_index import PTH_SUFFIXES, read_index, weight_files

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


class TensorFiles:
    """Names, shapes and dtypes of a model's tensors; a tensor is read when it is asked for.

    Args:
        files: one file, or every shard; .safetensors or PyTorch checkpoints. JSON files are ignored.
        expected: what the caller wants, for messages.
    Raises:
        ValueError: a file cannot be read, or is something else.
    """

    def __init__(self, files: Sequence[str | Path], *, expected: str) -> None:
        index = read_index(files, expected)
        self.label = index.label
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """Named as in safetensors."""
        self._sources: dict[str, safe_open | Mapping[str, Tensor]] = {}
        for path in weight_files(files, expected):
            if path.suffix.lower() in PTH_SUFFIXES:
                tensors = _load_pth(path, expected)
                self._sources |= dict.fromkeys(tensors, tensors)
                self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                self.dtypes |= {name: _PTH_DTYPES.get(t.dtype, str(t.dtype)) for name, t in tensors.items()}
                continue
            try:
                source = safe_open(path, framework="pt")
                parts = {name: source.get_slice(name) for name in source.keys()}  # noqa: SIM118 (not a mapping)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}; expected {expected}") from error
            self._sources |= dict.fromkeys(parts, source)
            self.shapes |= {name: tuple(part.get_shape()) for name, part in parts.items()}
            self.dtypes |= {name: part.get_dtype() for name, part in parts.items()}

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, backed by the file where the system allows it."""
        source = self._sources[name]
        try:
            return source[name] if isinstance(source, Mapping) else source.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.label}: tensor {name} cannot be read: {error}") from error


def fill(
    model: nn.Module,
    files: TensorFiles,
    source: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    scales: Mapping[str, str] | None = None,
) -> None:
    """Gives a model built on the meta device its weights: each is read, cast and moved alone.

    Args:
        source: parameter name of the model -> tensor name in the files, for every parameter.
        scales: tensor name -> name of the number or column that its values are multiplied by.
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
            read[name] = _cast(files, name, (scales or {}).get(name), dtype, device)
        weights[parameter] = read[name]
    # assign: the parameters become these very tensors, whatever dtype the library would prefer for them.
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()


def _cast(files: TensorFiles, name: str, scale: str | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    tensor = files.read(name).to(device)
    if scale is None:
        return tensor.to(dtype)
    factor = files.read(scale).to(device, torch.float32).flatten()
    if factor.numel() > 1:
        factor = factor.view(-1, *[1] * (tensor.dim() - 1))
    return tensor.to(torch.float32).mul_(factor).to(dtype)


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
