"""LoRA files -> updates by official parameter name, which are merged (merging.py) or stay beside (beside.py).

    W += strength * (alpha / rank * up @ down + diff)      (Hu et al., 2021, arXiv 2106.09685)

and its kin (families.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files.identify import describe_tensors
from ..files.quantised import stored_tensor
from ..files.stored_model import open_file
from ..files.stored_tensor import INTEGERS, PlainTensor, RowScale, ScaledTensor, StoredTensor
from ..model.config import HIGH_NOISE, LOW_NOISE
from ..model.selection import EVERYTHING, Selection
from .alpha import AdapterConfig, read_adapter_config
from .dora import Decomposed
from .families import Family, family_of, matrix_size
from .halves import of_whole, with_halves
from .module_names import LoraModule, ModuleNames, Role, factor_scales, lora_modules, skip_reason
from .origin import describe_origin
from .updates import Difference, Update, read_elements

_DIFFERENCES = {Role.DIFF: "weight", Role.DIFF_BIAS: "bias", Role.DIFF_MODULATION: "modulation"}
_NO_PARAMETER = "of parameters that the model does not have"

Shape = tuple[int, ...]


class Lora:
    """One LoRA file, for one transformer. Opening reads the header and the alphas; weights are read by `merge`.

    Args:
        path: a .safetensors file, of any trainer's naming (module_names.py).
        strength: factor of the whole change; 0: none, and the file is not opened.
        targets: the transformer's parameters, official name -> shape.
        expert: "high_noise" or "low_noise"; needed for a file that holds both experts' LoRAs.
        selection: of its changes.
    Raises:
        ValueError: the file is damaged, of an unsupported kind, or made for another model.
    """

    def __init__(
        self, path: str | Path, strength: float, targets: Mapping[str, Shape], *, expert: str | None = None,
        selection: Selection = EVERYTHING,
    ) -> None:  # fmt: skip
        assert expert in (None, HIGH_NOISE, LOW_NOISE), expert
        self.path = str(path)
        self.strength = strength
        self.updates: dict[str, list[Update]] = {}
        """By official parameter name."""
        self.skipped: dict[str, list[str]] = {}
        """Reason -> modules of the file that are left out."""
        self.applied = 0
        """Changes in the file that are used; a module may have several."""
        self._notes: list[str] = []
        self._without_alpha = 0
        self._alpha_sources: set[str] = set()
        if strength == 0:
            return
        self._file, self._selection = open_file(self.path), selection
        self._targets = with_halves(targets)
        try:
            self._scales = factor_scales(self._file.tensors)
            scales = set(self._scales.values())
            modules, unknown = lora_modules([name for name in self._file.tensors if name not in scales])
            if not modules:
                raise ValueError(f"it is {describe_tensors(self._file.tensors)}; expected a LoRA")
            if unknown:
                self.skipped["tensors that are no part of a LoRA"] = unknown
            self._plan(self._of_expert(modules, expert))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be used as a LoRA: {error}") from error

    def report(self) -> str:
        """One line for the log and the status."""
        if self.strength == 0:
            return f"LoRA {self.path}: strength 0, nothing applied"
        parts = [
            f"{len(names)} {reason} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for reason, names in self.skipped.items()
        ]
        count = sum(map(len, self.skipped.values()))
        skipped = f", skipped {count}: {', '.join(parts)}" if parts else ""
        notes = "".join(f"; {note}" for note in self._notes)
        return f"LoRA {self.path}, strength {self.strength:g}: applied {self.applied}{skipped}{notes}"

    def _of_expert(self, modules: list[LoraModule], expert: str | None) -> list[LoraModule]:
        """Leaves out the other expert's half of a file that holds two."""
        if len({module.second for module in modules}) == 1:
            return modules
        if expert is None:
            second = next(module.spelled for module in modules if module.second)
            raise ValueError(
                f"it holds LoRAs of both experts (such as {second}), and which one is meant is not known; "
                "split it into one file per expert"
            )
        keep = [module for module in modules if module.second == (expert == LOW_NOISE)]
        self.skipped["of the other expert"] = [m.spelled for m in modules if m.second != (expert == LOW_NOISE)]
        return keep

    def _plan(self, modules: list[LoraModule]) -> None:
        names = ModuleNames(self._targets)
        experts = {module.second for module in modules}
        configs = {
            second: read_adapter_config(Path(self.path), self._file.metadata, second=second) for second in experts
        }
        changed: dict[tuple[str, Role], str] = {}
        left_out = 0
        for module in modules:
            official = names.find(module.path)
            if official is None:
                self._skip(skip_reason(module), module.spelled)
                continue
            if not self._selection.has(official):
                left_out += 1
                continue
            for role in module.tensors:
                if changed.setdefault((official, role), module.spelled) != module.spelled:
                    raise ValueError(f"{changed[official, role]} and {module.spelled} both change {official}")
            family = family_of(module)
            if family is not None:
                self._add_product(module, official, family, configs[module.second])
            elif Role.MAGNITUDE in module.tensors:
                raise ValueError(
                    f"{module.spelled} has {module.tensors[Role.MAGNITUDE]} but no change that it belongs to"
                )
            for role, parameter in _DIFFERENCES.items():
                if role in module.tensors:
                    self._add_difference(module, official, role, parameter, self.strength)
        if left_out and not self.applied:
            raise ValueError(f"nothing of it is selected ({self._selection})")
        if not self.applied:
            raise ValueError(
                f"nothing in it fits this model, {describe_origin(self._targets)}; it looks made for "
                f"{self._origin()} (it changes {modules[0].spelled}, ...)"
            )
        if left_out:
            self._notes.append(f"{left_out} left out as selected ({self._selection})")
        if self._without_alpha:
            self._notes.append(f"{self._without_alpha} without alpha, taken as the rank")
        self._notes += [f"alpha from {source}" for source in sorted(self._alpha_sources)]

    def _add_product(self, module: LoraModule, official: str, family: Family, config: AdapterConfig) -> None:
        tensors = {role: self._tensor(module, role) for role in module.tensors if role not in _DIFFERENCES}
        try:
            size = family.size(tensors)
        except ValueError as error:
            raise ValueError(f"{module.spelled} is {error}") from error
        target = f"{official}.weight"
        if target not in self._targets:
            self._skip(_NO_PARAMETER, module.spelled)
            return
        expected = matrix_size(self._targets[target])
        # What turns rows takes any width.
        found = (size[0], size[1] or expected[1])
        if found != expected:
            self._wrong_size(module, official, found, expected)
            return
        alpha = self._alpha(module) if Role.ALPHA in module.tensors else None
        scale = self._scale(module, config, family.rank(tensors), alpha)
        if Role.MAGNITUDE in tensors:
            magnitude = self._magnitude(module, tensors[Role.MAGNITUDE], size[0])
            self._use(target, Decomposed(family.make(tensors, scale, alpha or 0.0), magnitude, self.strength))
        else:
            self._use(target, family.make(tensors, scale * self.strength, alpha or 0.0))
        if Role.UP_BIAS in module.tensors:
            self._add_difference(module, official, Role.UP_BIAS, "bias", scale * self.strength)

    def _scale(self, module: LoraModule, config: AdapterConfig, rank: int | None, alpha: float | None) -> float:
        """Of the change at strength 1.

        Args:
            rank: None where the file's alpha is none.
            alpha: in the file.
        """
        if alpha is not None:
            return 1.0 if rank is None else alpha / rank
        alpha = config.module_alpha(module.path)
        if alpha is None:
            self._without_alpha += rank is not None
            return 1.0 if rank is None or not config.rank_stabilised else math.sqrt(rank)
        self._alpha_sources.add(config.source)
        rank = config.rank if rank is None else rank
        if rank is None:
            raise ValueError(f"{config.source} has an alpha for {module.spelled} but no r")
        return alpha / (math.sqrt(rank) if config.rank_stabilised else rank)

    def _magnitude(self, module: LoraModule, stored: StoredTensor, rows: int) -> StoredTensor:
        shape = tuple(stored.shape)
        if math.prod(shape) != rows or (len(shape) == 2 and shape[0] != rows):
            raise ValueError(
                f"{module.tensors[Role.MAGNITUDE]} has shape {list(shape)}; supported is one length for each of the "
                f"weight's {rows} rows (DoRA of output channels)"
            )
        return stored

    def _alpha(self, module: LoraModule) -> float:
        stored, name = self._tensor(module, Role.ALPHA), module.tensors[Role.ALPHA]
        if math.prod(stored.shape) != 1:
            raise ValueError(f"{name} has shape {list(stored.shape)}; it must be one number")
        alpha = read_elements(stored, 0, 1).item()
        if not math.isfinite(alpha):
            raise ValueError(f"{name} is {alpha}; it must be a finite number")
        return alpha

    def _add_difference(self, module: LoraModule, official: str, role: Role, parameter: str, scale: float) -> None:
        diff = self._tensor(module, role)
        target = f"{official}.{parameter}"
        if role == Role.DIFF and target not in self._targets:
            target = official
        if target not in self._targets:
            self._skip(_NO_PARAMETER, f"{module.spelled}.{role.value}")
            return
        shape = self._targets[target]
        # Some write a convolution as its matrix, or leave out sizes of 1; the order of the elements is the same.
        if diff.shape != shape and matrix_size(diff.shape) != matrix_size(shape) and _wide(diff.shape) != _wide(shape):
            self._wrong_size(module, official, diff.shape, shape)
            return
        self._use(target, Difference(diff, scale))

    def _use(self, target: str, update: Update) -> None:
        parameter, change = of_whole(target, update, self._targets[target][0])
        self.updates.setdefault(parameter, []).append(change)
        self.applied += 1

    def _skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def _wrong_size(self, module: LoraModule, official: str, found: Sequence[int], expected: Sequence[int]) -> None:
        """The patch embedding alone differs between T2V and I2V, whose LoRAs are used for each other."""
        if official == "patch_embedding":
            self._skip("of a patch embedding with other input channels", module.spelled)
            return
        raise ValueError(
            f"{module.spelled} changes a parameter of {' x '.join(map(str, found))}; the model's is "
            f"{' x '.join(map(str, expected))}. It looks made for {self._origin()}; "
            f"this model is {describe_origin(self._targets)}"
        )

    def _origin(self) -> str:
        return describe_origin({name: info.shape for name, info in self._file.tensors.items()})

    def _tensor(self, module: LoraModule, role: Role) -> StoredTensor:
        name = module.tensors[role]
        info = self._file.tensors[name]
        if role == Role.ALPHA and info.dtype in INTEGERS:
            return PlainTensor(self.path, INTEGERS[info.dtype], info.shape, info.start)
        stored = stored_tensor(self._file, name)
        if name in self._scales:
            return self._scaled(stored, name)
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{name} is {stored.dtype}; it must be of a float dtype")
        return stored

    def _scaled(self, stored: StoredTensor, name: str) -> StoredTensor:
        scale, rows = stored_tensor(self._file, self._scales[name]), stored.shape[0] if stored.shape else 1
        fits = math.prod(scale.shape) == 1 or scale.shape in ((rows,), (rows, 1))
        if not isinstance(stored, PlainTensor) or not isinstance(scale, PlainTensor) or not fits:
            raise ValueError(
                f"{self._scales[name]} has shape {list(scale.shape)}; it must be one number, or one for each of the "
                f"{rows} rows of {name}"
            )
        if not scale.dtype.is_floating_point:
            raise ValueError(f"{self._scales[name]} is {scale.dtype}; it must be of a float dtype")
        return ScaledTensor(stored, RowScale(scale, rows))


def _wide(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
