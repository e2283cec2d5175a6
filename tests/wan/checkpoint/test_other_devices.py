"""A weight is computed where its rows are: on torch's meta device, where nothing that lies elsewhere may mix in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from block_formats import FORMATS, store
from checkpoint_formats import write_gguf, write_scaled
from safetensors.torch import save_file
from tiny import random_weights
from tiny_clip import write_clip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from umt5 import MODEL, train_spiece
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.keeping import Keeping
from wan_pack.wan.checkpoint.weights import empty_model, read_weights, take_memory
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.lora.merging import merge
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.text.text_encoder import load_text_encoder
from wan_pack.wan.vision.clip_encoder import load_clip

CONFIG = WanConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=1, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
META = torch.device("meta")
NAME = "blocks.0.ffn.0"
OUT, IN = 192, 256


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


FAMILIES = {
    "LoRA": {"lora_up.weight": ones(OUT, 2), "lora_down.weight": ones(2, IN)},
    "LoHa": {
        "hada_w1_a": ones(OUT, 2), "hada_w1_b": ones(2, IN), "hada_w2_a": ones(OUT, 2), "hada_w2_b": ones(2, IN)
    },
    "LoKr": {"lokr_w1": ones(4, 8), "lokr_w2": ones(OUT // 4, IN // 8)},
    "DoRA": {"lora_up.weight": ones(OUT, 2), "lora_down.weight": ones(2, IN), "dora_scale": ones(OUT, 1)},
    "OFT": {"oft_blocks": ones(OUT // 16, 16, 16), "rescale": ones(OUT, 1)},
    "difference": {"diff": ones(OUT, IN)},
}  # fmt: skip


def read(checkpoint: Checkpoint, loras: list[Lora], keeping: Keeping) -> None:
    model = empty_model(checkpoint, torch.bfloat16, loras, keeping)
    read_weights(model, checkpoint, [n for n, _ in model.named_parameters() if "blocks" in n], device=META, loras=loras)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
def test_loras_are_merged_where_the_weight_is(tmp_path: Path, family: str, dtype: torch.dtype | None) -> None:
    path, weights = tmp_path / "m.safetensors", random_weights(CONFIG)
    if dtype is None:
        save_file(weights, path)
    else:
        write_scaled(path, weights, dtype, scale="weight_scale", per_row=True)
    save_file({f"{NAME}.{role}": tensor for role, tensor in FAMILIES[family].items()}, tmp_path / "l.safetensors")
    checkpoint = Checkpoint([path])
    loras = [Lora(tmp_path / "l.safetensors", 0.5, checkpoint.shapes)]
    for keeping in (Keeping(), Keeping("fp8"), Keeping("int8"), Keeping(quantised_loras="beside")):
        read(checkpoint, loras, keeping)


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, but for a copy from one to the other and for single numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" not in func.name():
            found = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
            assert len(found) <= 1, f"{func.name()} of {found}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*FORMATS, "GGUF"])
def test_files_are_unpacked_where_the_weight_is(tmp_path: Path, kind: str) -> None:
    if kind == "GGUF":
        path = tmp_path / "m.gguf"
        write_gguf(path, random_weights(CONFIG), "Q8_0")
    else:
        path = tmp_path / "m.safetensors"
        store(path, kind, random_weights(CONFIG))
    out, staging = torch.empty(OUT, IN, device=META), torch.empty(1 << 20, dtype=torch.uint8)
    with OneDevice():
        Checkpoint([path]).read_into(f"{NAME}.weight", out, staging=staging)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_loras_add_is_computed_where_the_weight_is(tmp_path: Path, family: str) -> None:
    save_file({f"{NAME}.{role}": tensor for role, tensor in FAMILIES[family].items()}, tmp_path / "l.safetensors")
    lora = Lora(tmp_path / "l.safetensors", 0.5, {f"{NAME}.weight": (OUT, IN)})
    with OneDevice():
        merge([lora], f"{NAME}.weight", torch.empty(OUT, IN, device=META), 0)


def test_encoders_lie_where_they_are_asked_to(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(train_spiece())
    text = load_text_encoder([MODEL], [tmp_path / "spiece.model"], device=META).model
    clip = load_clip([write_clip(tmp_path / "clip.safetensors")], device=META)
    for model in (text, clip):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_memory_is_taken_where_it_is_asked_for() -> None:
    for placements in (None, ()):
        module, tensor = torch.nn.Module(), torch.nn.Parameter(torch.empty(2, 3))
        module.register_parameter("p", tensor)
        if placements is not None:
            tensor.placements = placements  # type: ignore[attr-defined]
        taken: list[Tensor] = []
        take_memory(module, META, then=lambda before, now, to=taken: to.append(now))
        assert [now.is_meta for now in taken] == [True]
