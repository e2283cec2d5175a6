"""What diffusers keeps in other tensors than the official code, of a transformer that is read.

    in diffusers' names                                    official
    to_k and to_v of a face's block, [C, C] each           linear1_kv, [2 * C, C]; their biases and scales likewise
    biases of the motion encoder's convolutions, [n]       [1, n, 1, 1]

The values are the same: neither keeps the motion encoder's weights scaled.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..files.diffusers_keys import HALF, OFFICIAL_ALONE
from ..files.diffusers_keys import MARKER as DIFFUSERS_MARKER
from ..files.stored_tensor import Joined, StoredTensor, is_scale

_BIAS = ".act_fn.bias"


def check_one_layout(names: Mapping[str, str], prefix: str) -> None:
    """Refuses a file of which only some parts were converted.

    Args:
        names: name in the files -> official one.
        prefix: what stands before the former.
    """
    theirs = f"{prefix}{DIFFUSERS_MARKER}" in names
    bare = {name: name.removeprefix(prefix) for name in names}
    if theirs:
        wrong = [name for name in names if OFFICIAL_ALONE.match(bare[name])]
    else:
        wrong = [name for name, own in names.items() if own != bare[name] and OFFICIAL_ALONE.match(own)]
    if wrong:
        most, some = ("diffusers'", "the official") if theirs else ("the official", "diffusers'")
        raise ValueError(
            f"it is a Wan transformer in {most} names with {len(wrong)} tensors in {some} ones "
            f"({', '.join(sorted(wrong)[:5])}): it was converted in part"
        )


def in_official_layout(stored: Mapping[str, StoredTensor], names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """`stored`, as the official code keeps it.

    Args:
        stored: by official name; halves of a layer as `to_official` calls them.
        names: name in the files -> that one.
    Raises:
        ValueError: a half has no other one of its shape.
    """
    spelled = {own: name for name, own in names.items()}
    made: dict[str, StoredTensor] = {}
    for own, tensor in stored.items():
        half = HALF.fullmatch(own)
        if half is None:
            is_row = spelled.get(own, "").endswith(_BIAS) and len(tensor.shape) == 1
            made[own] = Joined((tensor,), (1, *tensor.shape, 1, 1)) if is_row else tensor
            continue
        layer, which, leaf = half.groups()
        keys, values = (stored.get(f"{layer}.{other}{leaf}") for other in "kv")
        if keys is not None and values is not None and keys.shape == values.shape and keys.shape:
            made[f"{layer}{leaf}"] = Joined((keys, values), (2 * keys.shape[0], *keys.shape[1:]))
        # One half alone may be scaled: the whole is then read as values.
        elif not is_scale(tensor):
            other = values if which == "k" else keys
            has = "there is no other half of it" if other is None else f"its other half has {other.shape}"
            raise ValueError(f"tensor {spelled[own]} has shape {tensor.shape}, and {has}; expected two of one shape")
    return made
