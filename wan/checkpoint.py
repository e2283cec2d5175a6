"""Transformer checkpoints on disk -> official tensor names, read slice by slice.

Only headers are read to open one. Tensor bytes are read with `pread` into the tensor that keeps them (or a small
staging buffer when the dtype or device differs): a memory map would leave every page it touched in the process.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import WanConfig, config_from_shapes
from .headers import TensorInfo, read_header
from .identify import describe_tensors, wan_variant
from .model import meta_model

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PREFIX = "model.diffusion_model."
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
SINGLE_NAME = "diffusion_pytorch_model.safetensors"
MAX_JSON_BYTES = 16 << 20
STAGING_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one tensor's bytes are."""

    path: str
    info: TensorInfo


class Checkpoint:
    """An opened transformer checkpoint: names, shapes and where the bytes are.

    Raises:
        ValueError: naming the file, what it is and what was expected.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = tuple(str(file) for file in files)
        self._slots: dict[str, _Slot] = {}
        for file in self.files:
            for name, info in read_header(file).tensors.items():
                if name.removeprefix(PREFIX) in self._slots:
                    raise ValueError(f"{file}: tensor {name} is also in {self._slots[name.removeprefix(PREFIX)].path}")
                self._slots[name.removeprefix(PREFIX)] = _Slot(file, info)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: slot.info.shape for name, slot in self._slots.items()}
        self._refuse_other_files()
        try:
            self.config: WanConfig = config_from_shapes(self.shapes, num_heads=_num_heads(Path(self.files[0]).parent))
        except ValueError as error:
            raise ValueError(f"{self.files[0]}: {error}") from error
        self._check_tensors()

    @property
    def label(self) -> str:
        """The file, or the folder of a sharded checkpoint, for messages."""
        return self.files[0] if len(self.files) == 1 else str(Path(self.files[0]).parent)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(slot.info.end - slot.info.start for slot in self._slots.values())

    def read_into(self, name: str, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        """Reads elements of tensor `name` from flat index `start` on, until `out` is full.

        Args:
            out: contiguous, any device and float dtype; values are cast.
            staging: uint8 buffer on the CPU, page-locked for a copy to a GPU; needed unless `out` is on the CPU with
                the file's own dtype.
        Raises:
            OSError: the file ended early or cannot be read.
        """
        slot = self._slots[name]
        dtype = DTYPES[slot.info.dtype]
        flat = out.view(-1)
        offset = slot.info.start + start * dtype.itemsize
        with open(slot.path, "rb", buffering=0) as file:
            if flat.device.type == "cpu" and flat.dtype == dtype:
                _pread(file.fileno(), flat.view(torch.uint8), offset, slot.path)
                return
            assert staging is not None, "casting or copying to a device needs a staging buffer"
            per_read = staging.numel() // dtype.itemsize
            for begin in range(0, flat.numel(), per_read):
                piece = flat[begin : begin + per_read]
                raw = staging[: piece.numel() * dtype.itemsize]
                _pread(file.fileno(), raw, offset + begin * dtype.itemsize, slot.path)
                # Cast where the parameter is: a GPU does it in no time, a CPU at a few GB/s.
                piece.copy_(raw.view(dtype).to(piece.device, non_blocking=True))
                if piece.device.type == "cuda":
                    # The next read overwrites the buffer that this copy reads from.
                    torch.cuda.current_stream(piece.device).synchronize()

    def _refuse_other_files(self) -> None:
        found = wan_variant(self.shapes) if "head.modulation" in self.shapes else describe_tensors(self.shapes.keys())
        if found is not None:
            raise ValueError(
                f"{self.label} is {found}; expected a Wan2.2 T2V transformer (official folder or ComfyUI single file)"
            )

    def _check_tensors(self) -> None:
        wrong = {name: slot.info.dtype for name, slot in self._slots.items() if slot.info.dtype not in DTYPES}
        if wrong:
            name, dtype = next(iter(wrong.items()))
            raise ValueError(
                f"{self.label} holds {len(wrong)} tensors such as {name} in {dtype}; "
                f"this version reads {', '.join(DTYPES)} (bf16, fp16 and fp32 files)"
            )
        expected = {name: tuple(p.shape) for name, p in meta_model(self.config, torch.float32).named_parameters()}
        missing = sorted(set(expected) - set(self.shapes))
        extra = sorted(set(self.shapes) - set(expected))
        if missing or extra:
            raise ValueError(
                f"{self.label} is not a whole Wan2.2 T2V transformer: {len(missing)} tensors are missing "
                f"(first {missing[:5]}) and {len(extra)} are unknown (first {extra[:5]})"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(f"{self.label}: tensor {name} has shape {self.shapes[name]}; expected {shape}")


def checkpoint_files(path: str | Path) -> tuple[Path, ...]:
    """The safetensors files of what a user picked: a file, or a folder in the official layout.

    Raises:
        ValueError: the folder has no checkpoint, or its index names files that are not there.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is a {path.suffix or 'file without suffix'}; expected a .safetensors file")
        return (path,)
    if not (path / INDEX_NAME).exists():
        if (path / SINGLE_NAME).exists():
            return (path / SINGLE_NAME,)
        raise ValueError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    weight_map = _read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise ValueError(f"{path / INDEX_NAME} names {name!r}, which is not a file in {path}")
    return tuple(path / name for name in names)


def _num_heads(folder: Path) -> int | None:
    """From the official config.json beside the file; None where there is none (ComfyUI's model folders)."""
    if not (folder / "config.json").is_file():
        return None
    config = _read_json(folder / "config.json")
    if config.get("_class_name") != "WanModel":
        return None
    num_heads = config.get("num_heads")
    if type(num_heads) is not int or num_heads < 1:
        raise ValueError(f"{folder / 'config.json'}: num_heads is {num_heads!r}; it must be a positive number")
    return num_heads


def _read_json(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if len(data) > MAX_JSON_BYTES or not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object of at most {MAX_JSON_BYTES} bytes")
    return value


def _pread(fd: int, out: Tensor, offset: int, path: str) -> None:
    # Not out.numpy(): torch would never again let that storage be resized, which offloading does.
    view = memoryview((ctypes.c_ubyte * out.numel()).from_address(out.data_ptr())).cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"{path} ended at byte {offset + done}, {len(view) - done} bytes early")
        done += count
