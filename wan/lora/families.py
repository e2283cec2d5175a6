"""The tensors of one module -> what they add to its weight, by the family of LoRA that they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..files.stored_tensor import StoredTensor
from .module_names import LoraModule, Role
from .oft import Rotation
from .updates import Hadamard, Kronecker, LowRank, Update

Tensors = Mapping[Role, StoredTensor]


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write a change of a matrix."""

    name: str
    needs: tuple[tuple[Role, ...], ...]
    """Sets of tensors, each of which is enough."""
    size: Callable[[Tensors], tuple[int, int]]
    """(out, in) of the change. Raises ValueError if its tensors do not fit each other."""
    rank: Callable[[Tensors], int | None]
    """What alpha is divided by; None: alpha has no effect."""
    make: Callable[[Tensors, float, float], Update]
    """(tensors, scale, alpha) -> the change times `scale`."""


def matrix_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows, and everything else: a convolution [out, in, t, h, w] is a matrix [out, in * t * h * w]."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def family_of(module: LoraModule) -> Family | None:
    """None: the module's weight is only added to, by a full difference, or not at all.

    Raises:
        ValueError: a tensor is missing, or there are those of two families.
    """
    found = [family for family in FAMILIES if any(role in module.tensors for roles in family.needs for role in roles)]
    if len(found) > 1:
        raise ValueError(f"{module.spelled} has tensors of {' and '.join(family.name for family in found)}")
    if not found:
        return None
    (family,) = found
    if not any(all(role in module.tensors for role in roles) for roles in family.needs):
        present = next(iter(module.tensors.values()))
        lacks = [[role.value for role in roles if role not in module.tensors] for roles in family.needs]
        fewest = min(lacks, key=len)
        raise ValueError(f"{module.spelled} has {present} but no {' and '.join(fewest)}")
    return family


def _product(up: StoredTensor, down: StoredTensor) -> tuple[int, int]:
    rank = down.shape[0] if down.shape else 0
    if len(down.shape) < 2 or len(up.shape) < 2 or rank == 0 or math.prod(up.shape[1:]) != rank:
        raise ValueError(f"{list(up.shape)} times {list(down.shape)}, which are not factors of a matrix")
    return up.shape[0], math.prod(down.shape[1:])


def _hadamard_size(tensors: Tensors) -> tuple[int, int]:
    sizes = [_product(tensors[up], tensors[down]) for up, down in _HADA]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{list(sizes[0])} and {list(sizes[1])}, which cannot be multiplied element by element")
    return sizes[0]


def _factors(tensors: Tensors, whole: Role, up: Role, down: Role) -> tuple[StoredTensor, ...]:
    return (tensors[whole],) if whole in tensors else (tensors[up], tensors[down])


def _kronecker_size(tensors: Tensors) -> tuple[int, int]:
    sizes = []
    for factors in (_factors(tensors, *roles) for roles in _LOKR):
        if len(factors) == 2:
            sizes.append(_product(*factors))
        elif len(factors[0].shape) < 2 or 0 in factors[0].shape:
            raise ValueError(f"{list(factors[0].shape)}, which is not a matrix")
        else:
            sizes.append(matrix_size(factors[0].shape))
    return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]


def _kronecker_rank(tensors: Tensors) -> int | None:
    ranks = [tensors[roles[2]].shape[0] for roles in _LOKR if roles[2] in tensors]
    return ranks[-1] if ranks else None


def _rotation_size(tensors: Tensors) -> tuple[int, int]:
    shape = tensors[Role.OFT_BLOCKS].shape
    if len(shape) == 4:
        raise ValueError(f"{list(shape)}, which is BOFT; supported is OFT")
    if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
        raise ValueError(f"{list(shape)}; expected square blocks")
    rows = shape[0] * shape[1]
    rescale = tensors.get(Role.OFT_RESCALE)
    if rescale is not None and math.prod(rescale.shape) != rows:
        raise ValueError(f"of {rows} rows with a rescale of {list(rescale.shape)}")
    # It turns rows and leaves their width alone.
    return rows, 0


_HADA = ((Role.HADA_W1_A, Role.HADA_W1_B), (Role.HADA_W2_A, Role.HADA_W2_B))
_LOKR = ((Role.LOKR_W1, Role.LOKR_W1_A, Role.LOKR_W1_B), (Role.LOKR_W2, Role.LOKR_W2_A, Role.LOKR_W2_B))

FAMILIES = (
    Family(
        name="LoRA", needs=((Role.UP, Role.DOWN),),
        size=lambda t: _product(t[Role.UP], t[Role.DOWN]), rank=lambda t: t[Role.DOWN].shape[0],
        make=lambda t, scale, alpha: LowRank(t[Role.DOWN], t[Role.UP], scale),
    ),
    Family(
        name="LoHa", needs=(_HADA[0] + _HADA[1],), size=_hadamard_size, rank=lambda t: t[Role.HADA_W1_B].shape[0],
        make=lambda t, scale, alpha: Hadamard(
            (t[Role.HADA_W1_A], t[Role.HADA_W2_A]), (t[Role.HADA_W1_B], t[Role.HADA_W2_B]), scale
        ),
    ),
    Family(
        name="LoKr", needs=tuple(w1 + w2 for w1 in (_LOKR[0][:1], _LOKR[0][1:]) for w2 in (_LOKR[1][:1], _LOKR[1][1:])),
        size=_kronecker_size, rank=_kronecker_rank,
        make=lambda t, scale, alpha: Kronecker(_factors(t, *_LOKR[0]), _factors(t, *_LOKR[1]), scale),
    ),
    Family(
        name="OFT", needs=((Role.OFT_BLOCKS,),), size=_rotation_size, rank=lambda t: None,
        # Its alpha is a bound on the rotation, by the number of rows.
        make=lambda t, scale, alpha: Rotation(
            t[Role.OFT_BLOCKS], t.get(Role.OFT_RESCALE), alpha * _rotation_size(t)[0], scale
        ),
    ),
)  # fmt: skip
