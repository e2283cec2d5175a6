"""What nodes add to a model's weights -> LoRA files, which the processes read and merge as any other.

ComfyUI's LoRA loaders hand on tensors, not the file that they are from; and other nodes make them. They are written
under the names that trainers use, so that `wan/lora` decides what is supported and refuses the rest by its name.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...distributed.job.model_files import LoraFile
from ..host.core_model import AddedPatches
from ..host.declared import kind_of
from ..models import catalogue
from .unsupported import WHAT_TO_DO

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 4
"""Files whose patches are gone, of those used last: ranks look up in them what they have merged, so that another
strength costs no more than what it changes."""
PREFIX = "diffusion_model."
"""Of the transformer's parameters in ComfyUI's names."""
_ADAPTERS = {
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "reshape_weight"),
    "loha": (
        *("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        "dora_scale",
    ),
    "lokr": (
        *("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        "dora_scale",
    ),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha", "dora_scale"),
    "oft": ("oft_blocks", "rescale", "alpha", "dora_scale"),
    "boft": ("boft_blocks", "rescale", "alpha", "dora_scale"),
}
"""ComfyUI's name of a LoRA family -> what its `weights` are, in order, by their names in files."""
_PLAIN = {"diff": {"weight": "diff", "bias": "diff_b", "": "diff"}, "set": {"weight": "set_weight"}}
"""Kind of a change that is no product -> end of the parameter's name -> the tensor's name."""


class PatchFiles:
    """Such files, each for as long as the patches that it is made of are in use, and the last few for longer.

    Args:
        folder: where they are written, by their content: a group that has merged one knows it again.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._paths: weakref.WeakKeyDictionary[AddedPatches, Path] = weakref.WeakKeyDictionary()
        self._users: dict[Path, int] = {}
        self._unused: dict[Path, None] = {}
        """The one that became so last is last."""
        self._lock = threading.RLock()

    def files(self, added: Iterable[AddedPatches]) -> tuple[LoraFile, ...]:
        """Raises ValueError for what no LoRA file can say."""
        return tuple(
            LoraFile(file=catalogue.identity(self._path(one)), strength=float(one.strength))
            for one in added
            # What scales the weights themselves is refused, not left out.
            if one.patches and (one.strength != 0 or one.model_strength != 1)
        )

    def _path(self, added: AddedPatches) -> Path:
        with self._lock:
            known = self._paths.get(added)
            if known is not None and known.exists():
                return known
        tensors = _tensors(added)
        path = self._folder() / f"lora-{_digest(tensors)}.safetensors"
        with self._lock:
            if known is None:
                # Before it is looked for, in this order: `_drop`, which removes what is unused, may run in the midst.
                self._users[path] = self._users.get(path, 0) + 1
                self._unused.pop(path, None)
                weakref.finalize(added, self._drop, path)
            if not path.exists():
                _write(tensors, path)
            self._paths[added] = path
        return path

    def _drop(self, path: Path) -> None:
        with self._lock:
            self._users[path] -= 1
            if self._users[path] == 0:
                del self._users[path]
                self._unused[path] = None
                for old in list(self._unused)[:-KEPT]:
                    del self._unused[old]
                    old.unlink(missing_ok=True)


def _tensors(added: AddedPatches) -> dict[str, Tensor]:
    """By their names in a LoRA file."""
    if added.model_strength != 1:
        raise ValueError(f"a node merges another model into this one; {WHAT_TO_DO}")
    tensors: dict[str, Tensor] = {}
    for key, patch in added.patches.items():
        if not isinstance(key, str) or not key.startswith(PREFIX):
            raise ValueError(f"a node patches a part of a weight ({key}); {WHAT_TO_DO}")
        name = key.removeprefix(PREFIX)
        tensors |= {f"{_module(name)}.{part}": tensor for part, tensor in _parts(name, patch)}
    return tensors


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _parts(name: str, patch: Any) -> Iterable[tuple[str, Tensor]]:
    """The tensors of one parameter's change, and what each is."""
    import torch

    names = _ADAPTERS.get(getattr(patch, "name", ""))
    if names is not None and len(names) == len(patch.weights):
        for part, value in zip(names, patch.weights, strict=True):
            if value is not None:
                yield part, value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float32)
        return
    kind, values = patch if isinstance(patch, tuple) and len(patch) == 2 else ("diff", patch)
    end = name.rpartition(".")[2]
    change = _PLAIN.get(kind, {}).get(end if end in ("weight", "bias") else "") if isinstance(kind, str) else None
    if change is None or not isinstance(values, tuple) or not isinstance(values[0], torch.Tensor):
        raise ValueError(f"a node changes {name} by {kind_of(patch)}, which no LoRA file can say; {WHAT_TO_DO}")
    yield change, values[0]


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, dtypes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()[:32]


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
