"""Transformer checkpoints on disk -> official tensor names, read slice by slice. Only headers are read to open one.

    official folder         config.json, shards and their index, official names
    diffusers folder        the same with diffusers' names
    single .safetensors     official or diffusers' names, with or without a prefix; other models beside it are ignored
    .gguf                   official names

in fp32, bf16, fp16, fp8, int8 and the types of GGUF.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..files.diffusers_keys import MARKER as DIFFUSERS_MARKER
from ..files.diffusers_keys import to_official
from ..files.gguf_files import GgufFile
from ..files.headers import HeadersTogether, TensorInfo, read_header
from ..files.identify import describe_tensors
from ..files.model_folder import read_json_object, shard_files
from ..files.quant_formats import quant_formats
from ..files.quantised import DTYPES, READS, is_unused, pair_scales, refused_format
from ..files.stored_tensor import PackedTensor, PlainTensor, RowScale, StoredTensor
from ..model.config import WanConfig, config_from_shapes
from ..model.linear import FP8_DTYPES, Fp8Weight
from ..model.transformer import meta_model, parameter_dtype
from ..model.variants import RUNNABLE, check_runs

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
"""In front of every tensor of the transformer, by who saved the file."""
MARKERS = ("head.modulation", DIFFUSERS_MARKER)
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
SINGLE_NAME = "diffusion_pytorch_model.safetensors"
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model", "transformer", "transformer_2")
STAGING_BYTES = 32 << 20

_NUM_HEADS = {"WanModel": "num_heads", "WanTransformer3DModel": "num_attention_heads"}
"""Class in config.json -> its name for the number of heads."""
_FLOATS = ("F32", "BF16", "F16")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor as its file names it."""

    path: str
    dtype: str
    """safetensors' or GGUF's name of it."""
    place: TensorInfo | PackedTensor

    def stored(self) -> StoredTensor:
        if isinstance(self.place, PackedTensor):
            return self.place
        return PlainTensor(self.path, DTYPES[self.dtype], self.place.shape, self.place.start)


class Checkpoint:
    """An opened transformer checkpoint: names, shapes and where the bytes are.

    Raises:
        ValueError: naming the file, what it is and what was expected.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = tuple(str(file) for file in files)
        everything: dict[str, _Found] = {}
        formats: dict[str, str] = {}
        together = HeadersTogether()
        for file in self.files:
            tensors, says = _open(file, together)
            for name in tensors.keys() & everything.keys():
                raise ValueError(f"{file}: tensor {name} is also in {everything[name].path}")
            everything |= tensors
            formats |= says
        prefix = _prefix(everything)
        if prefix is None:
            raise ValueError(f"{self.label} is {describe_tensors(everything)}; expected {RUNNABLE}")
        try:
            found = _official(everything, prefix)
            _refuse_formats(found, _official(formats, prefix))
            self._stored = pair_scales({name: tensor.stored() for name, tensor in found.items() if not is_unused(name)})
            self.shapes: Mapping[str, tuple[int, ...]] = {
                name: tensor.shape for name, tensor in self._stored.items() if not isinstance(tensor, RowScale)
            }
            check_runs(self.shapes)
            self.config: WanConfig = config_from_shapes(self.shapes, num_heads=_num_heads(Path(self.files[0]).parent))
            _check_complete(self.shapes, self.config)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error
        self._dtypes = {name: found[name].dtype for name in self.shapes}
        self.fp8: Mapping[str, Fp8Weight] = {
            name: Fp8Weight(tensor.dtype, tensor.scale is not None)
            for name, tensor in self._stored.items()
            if isinstance(tensor, PlainTensor) and tensor.dtype in FP8_DTYPES and _may_stay_fp8(name, tensor)
        }
        """The weights that stay fp8 in memory; those of the time path and the head are unpacked."""

    @property
    def label(self) -> str:
        """The file, or the folder of a sharded checkpoint, for messages."""
        return self.files[0] if len(self.files) == 1 else str(Path(self.files[0]).parent)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    def describe(self) -> str:
        """One line for the log: how the weights are stored, and what becomes of quantised ones."""
        kinds = Counter(dtype for name, dtype in self._dtypes.items() if len(self.shapes[name]) > 1)
        text = f"{self.label}: " + ", ".join(f"{count} weights in {kind}" for kind, count in kinds.most_common())
        if self.fp8:
            scaled = sum(weight.scaled for weight in self.fp8.values())
            text += f"; {len(self.fp8)} of them stay fp8 in memory, {scaled} with scales"
        elif kinds.keys() - set(_FLOATS):
            text += "; quantised ones are unpacked while they are read"
        return text

    def read_into(self, name: str, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        """Reads elements of tensor `name` from flat index `start` on, until `out` is full.

        Args:
            name: official name, or that of a weight with "_scale" behind it: its scale, [rows, 1].
            out: contiguous, any device and float dtype; values are cast. Of the file's own fp8 dtype: the codes, to
                which the scale is still to be applied.
            staging: uint8 buffer on the CPU, page-locked for a copy to a GPU; needed unless `out` is on the CPU with
                the file's own dtype.
        Raises:
            OSError: the file ended early or cannot be read.
            ValueError: a scale is not a finite number.
        """
        self._stored[name].read_into(out, start=start, staging=staging)


def checkpoint_files(path: str | Path) -> tuple[Path, ...]:
    """The files of what a user picked: a file, or one expert's folder in the official or diffusers' layout.

    Raises:
        ValueError: the folder has no checkpoint, or its index names files that are not there.
    """
    path = Path(path)
    if not path.is_dir():
        if path.suffix.lower() not in (".safetensors", ".gguf"):
            kind = path.suffix or "file without suffix"
            raise ValueError(f"{path} is a {kind}; expected a .safetensors or .gguf file")
        return (path,)
    if (path / INDEX_NAME).exists():
        return shard_files(path / INDEX_NAME)
    if (path / SINGLE_NAME).exists():
        return (path / SINGLE_NAME,)
    experts = [name for name in EXPERT_FOLDERS if (path / name).is_dir()]
    instead = f"; choose one of its folders {', '.join(experts)}" if experts else ""
    raise ValueError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}{instead}")


def _open(file: str, together: HeadersTogether) -> tuple[dict[str, _Found], dict[str, str]]:
    """The tensors of one file, and the quantised formats that it names, by layer."""
    if Path(file).suffix.lower() == ".gguf":
        gguf = GgufFile(file)
        together.add(file, gguf.header_bytes, len(gguf.tensors))
        return {name: _Found(file, t.type_name, PackedTensor(gguf, name)) for name, t in gguf.tensors.items()}, {}
    header = read_header(file)
    together.add(file, header.nbytes, len(header.tensors))
    return {name: _Found(file, t.dtype, t) for name, t in header.tensors.items()}, quant_formats(file, header)


def _prefix(names: Collection[str]) -> str | None:
    for prefix in PREFIXES:
        if any(prefix + marker in names for marker in MARKERS):
            return prefix
    return None


def _official(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What belongs to the transformer, by official name; what an all-in-one file holds beside it is left out."""
    own = {name: to_official(name.removeprefix(prefix)) for name in named if name.startswith(prefix)}
    official = {to: named[name] for name, to in own.items()}
    if len(official) < len(own):
        twice = Counter(own.values()).most_common(1)[0][0]
        raise ValueError(f"it holds {', '.join(name for name, to in own.items() if to == twice)}, which are the same")
    return official


def _refuse_formats(found: Mapping[str, _Found], formats: Mapping[str, str]) -> None:
    plain = {name: tensor.dtype for name, tensor in found.items() if isinstance(tensor.place, TensorInfo)}
    quantised = refused_format(plain, formats)
    if quantised is not None:
        raise ValueError(f"it is quantised as {quantised}; {READS}")
    wrong = [name for name, dtype in plain.items() if dtype not in DTYPES and not is_unused(name)]
    if wrong:
        raise ValueError(f"it holds {len(wrong)} tensors such as {wrong[0]} in {plain[wrong[0]]}; {READS}")


def _may_stay_fp8(name: str, tensor: PlainTensor) -> bool:
    """Whether it is a matrix that `Linear` multiplies by in the compute dtype."""
    large = parameter_dtype(name, torch.bfloat16) == torch.bfloat16
    return large and name.endswith(".weight") and len(tensor.shape) == 2


def _check_complete(shapes: Mapping[str, tuple[int, ...]], config: WanConfig) -> None:
    # One block stands for all: forty take a third of a second, for each file that is looked at.
    one_block = meta_model(replace(config, num_layers=1), torch.float32)
    expected = {
        name.replace("blocks.0.", f"blocks.{i}."): tuple(parameter.shape)
        for name, parameter in one_block.named_parameters()
        for i in range(config.num_layers if name.startswith("blocks.0.") else 1)
    }
    missing = sorted(set(expected) - set(shapes))
    extra = sorted(set(shapes) - set(expected))
    if missing or extra:
        raise ValueError(
            f"it is not a whole Wan transformer: {len(missing)} tensors are missing "
            f"(first {missing[:5]}) and {len(extra)} are unknown (first {extra[:5]})"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"tensor {name} has shape {shapes[name]}; expected {shape}")


def _num_heads(folder: Path) -> int | None:
    """From the config.json beside the file; None where there is none, or another model's (ComfyUI's folders)."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json_object(folder / "config.json")
    key = _NUM_HEADS.get(str(config.get("_class_name")))
    if key is None:
        return None
    num_heads = config.get(key)
    if type(num_heads) is not int or num_heads < 1:
        raise ValueError(f"{folder / 'config.json'}: {key} is {num_heads!r}; it must be a positive number")
    return num_heads
