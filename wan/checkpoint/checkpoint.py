"""Transformer checkpoints on disk -> official tensor names, read slice by slice. Only headers are read to open one.

    official folder         config.json, shards and their index, official names
    diffusers folder        the same with diffusers' names
    single .safetensors     official or diffusers' names, with or without a prefix; other models beside it are ignored
    .gguf                   official names

in fp32, bf16, fp16, fp8, int8 and the types of GGUF.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..files.block_scaled import BlockScaled, Grouped
from ..files.diffusers_keys import MARKER as DIFFUSERS_MARKER
from ..files.diffusers_keys import to_official, whole
from ..files.identify import describe_tensors, prefixes
from ..files.model_folder import folder_files
from ..files.rotated import Rotated
from ..files.stored_model import StoredModel, open_model
from ..files.stored_tensor import Joined, PlainTensor, StoredTensor, is_scale
from ..model.config import WanConfig, config_from_shapes
from ..model.eight_bits import CODES, FP8_DTYPES, KeptWeight
from ..model.variants import RUNNABLE, Variant, check_runs
from ..transformer.motion_encoder import BLUR, BLUR_TENSOR
from ..transformer.transformer import meta_model, parameter_dtype
from .config_texts import read_config_texts
from .diffusers_layout import check_one_layout, in_official_layout

MARKERS = ("head.modulation", DIFFUSERS_MARKER)
"""Tensors by which the transformer's names, and what stands before them, are found."""
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model", "transformer", "transformer_2")

_FLOATS = ("F32", "BF16", "F16")


class Checkpoint:
    """An opened transformer checkpoint: names, shapes and where the bytes are.

    Raises:
        ValueError: naming the file, what it is and what was expected.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = tuple(str(file) for file in files)
        model = open_model(files, RUNNABLE)
        self.label = model.label
        """The file, or the folder of a sharded checkpoint, for messages."""
        try:
            names = _official(model)
            self._stored = in_official_layout(model.weights(names), names)
            shapes = {name: tensor.shape for name, tensor in self._stored.items() if not is_scale(tensor)}
            check_runs(shapes)
            told = read_config_texts(Path(self.files[0]).parent, model.metadata)
            self.config: WanConfig = config_from_shapes(shapes, num_heads=told.num_heads, vace_layers=told.vace_layers)
            expected = _expected_shapes(self.config)
            for name, shape in expected.items():
                if isinstance(blocks := self._stored.get(name), BlockScaled):
                    self._stored[name] = blocks.without_padding(shape)
                    shapes[name] = self._stored[name].shape
            self.markers = _check_complete(shapes, expected, self.config.variant)
            """Tensors that hold no weight: they only say what the file is."""
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from error
        self.shapes: Mapping[str, tuple[int, ...]] = {n: s for n, s in shapes.items() if n not in self.markers}
        self._dtypes = {
            whole(own): model.tensors[name].dtype for name, own in names.items() if whole(own) in self.shapes
        }
        self.codes: Mapping[str, KeptWeight] = {
            name: kept for name, tensor in self._stored.items() if (kept := _as_kept(name, tensor)) is not None
        }
        """The weights whose codes may stay in memory; those of the time path and the head are unpacked."""

    def describe(self, kept: Mapping[str, KeptWeight] | None = None) -> str:
        """One line for the log: how the weights are stored, and what becomes of quantised ones.

        Args:
            kept: how they are kept in memory (`Keeping.weights`); None: fp8 as it is, all else unpacked.
        """
        kinds = Counter(dtype for name, dtype in self._dtypes.items() if len(self.shapes[name]) > 1)
        text = f"{self.label}: " + ", ".join(f"{count} weights in {kind}" for kind, count in kinds.most_common())
        if kept is None:
            kept = {name: weight for name, weight in self.codes.items() if weight.dtype in FP8_DTYPES}
        for kind, dtypes in (("fp8", FP8_DTYPES), ("int8", (torch.int8,))):
            scaled = [weight.scaled for weight in kept.values() if weight.dtype in dtypes]
            if scaled:
                verb = "stay" if self.codes else "become"
                text += f"; {len(scaled)} of them {verb} {kind} in memory, {sum(scaled)} with scales"
        if not kept and kinds.keys() - set(_FLOATS):
            text += "; quantised ones are unpacked while they are read"
        return text

    def read_into(self, name: str, out: Tensor, *, start: int = 0, staging: Tensor | None = None) -> None:
        """Reads elements of tensor `name` from flat index `start` on, until `out` is full.

        Args:
            name: official name, or that of a weight with "_scale" behind it: its scale, [rows, 1].
            out: contiguous, any device and float dtype; values are cast. Of the dtype of the weight in `codes`: those.
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
    experts = [name for name in EXPERT_FOLDERS if (path / name).is_dir()]
    expected = f"{RUNNABLE}; choose one of its folders {', '.join(experts)}" if experts else RUNNABLE
    files = folder_files(path, expected)
    for file in files:
        if file.suffix.lower() not in (".safetensors", ".gguf"):
            kind = file.suffix or "file without suffix"
            raise ValueError(f"{file} is a {kind}; expected a .safetensors or .gguf file")
    return files


def _official(model: StoredModel) -> dict[str, str]:
    """Name in the files -> official one, of all that belongs to the transformer beside other models."""
    found = prefixes(model.tensors, MARKERS)
    if len(found) != 1:
        what = "several transformers, " + ", ".join(found) if found else describe_tensors(model.tensors)
        raise ValueError(f"it is {what}; expected {RUNNABLE}")
    own = {name: to_official(name.removeprefix(found[0])) for name in model.tensors if name.startswith(found[0])}
    check_one_layout(own, found[0])
    twice = [name for name, count in Counter(own.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"it holds {', '.join(name for name, to in own.items() if to == twice[0])}, which are the same"
        )
    return own


def _as_kept(name: str, tensor: StoredTensor) -> KeptWeight | None:
    """None: it is no matrix that `Linear` multiplies by in the compute dtype, or not of such codes."""
    large = parameter_dtype(name, torch.bfloat16) == torch.bfloat16
    if not large or not name.endswith(".weight") or len(tensor.shape) != 2:
        return None
    if isinstance(tensor, Joined):
        first, *others = (_as_kept(name, part) for part in tensor.parts)
        return first if all(other == first for other in others) else None
    plain, rotated_by = (tensor.stored, tensor.group) if isinstance(tensor, Rotated) else (tensor, 0)
    if isinstance(plain, Grouped):
        return KeptWeight(torch.int8, True, rotated_by)
    # Rotated fp8 is rare: its values are read.
    if not isinstance(plain, PlainTensor) or plain.dtype not in (CODES if not rotated_by else (torch.int8,)):
        return None
    return KeptWeight(plain.dtype, plain.scale is not None, rotated_by)


def _smallest(config: WanConfig) -> WanConfig:
    """With one main block, or two with the first two VACE blocks behind them."""
    vace = tuple(range(min(len(config.vace_layers), 2)))
    return replace(config, num_layers=max(len(vace), 1), vace_layers=vace)


@functools.lru_cache(maxsize=8)
def _expected_shapes(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of a model."""
    # One block of a kind stands for the others: forty take a third of a second, for each file that is looked at.
    small = meta_model(_smallest(config), torch.float32)
    expected = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    known = set(small.config.block_names)
    for block in config.block_names:
        kind = block.partition(".")[0]
        # The first VACE block differs from the others.
        stand_in = next(name for name in (block, f"{kind}.1", f"{kind}.0") if name in known)
        of_block = small.get_submodule(stand_in).named_parameters()
        expected |= {f"{block}.{name}": tuple(parameter.shape) for name, parameter in of_block}
    return MappingProxyType(expected)


def _check_complete(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], variant: Variant
) -> frozenset[str]:
    """Refuses a model that is not whole, or more than that. Returns the names of tensors that are only marks."""
    roots = {name.partition(".")[0] for name in expected}
    # One number outside of the model's modules cannot be a weight of it.
    marks = {
        name
        for name in shapes.keys() - expected
        if math.prod(shapes[name]) <= 1 and name.partition(".")[0] not in roots
    }
    if "motion_encoder" in roots:
        marks |= {name for name, shape in shapes.items() if BLUR_TENSOR.fullmatch(name) and shape == (len(BLUR),) * 2}
    missing = sorted(expected.keys() - shapes)
    extra = sorted(shapes.keys() - expected - marks)
    if missing:
        raise ValueError(
            f"it is not a whole {variant.name} transformer: {len(missing)} tensors are missing "
            f"({', '.join(missing[:5])})"
        )
    if extra:
        raise ValueError(
            f"it holds a whole {variant.name} transformer and {len(extra)} tensors that are unknown "
            f"({', '.join(extra[:5])}): it is another model, which this pack does not run; expected {RUNNABLE}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"tensor {name} has shape {shapes[name]}; expected {shape}")
    return frozenset(marks)
