"""Nothing that a header says fails after a process has started: whatever a loader refuses, the preflight refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import tiny_job
from safetensors.torch import load_file, save_file
from tiny import TINY, TINY_VACE, random_weights
from torch import Tensor
from wan_pack.distributed.job.job import FileIdentity, LoraFile, ModelFiles, Parallel
from wan_pack.distributed.planning.preflight import check_forwards, check_model
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.checkpoint.weights import empty_model, read_weights
from wan_pack.wan.lora.lora import Lora
from wan_pack.wan.text.text_encoder import load_text_encoder
from wan_pack.wan.vae.autoencoder import load_vae

State = dict[str, Tensor]


def load_expert(path: Path) -> None:
    checkpoint, device = Checkpoint([path]), torch.device("cpu")
    read_weights(empty_model(checkpoint, torch.float32).to_empty(device=device), checkpoint, device=device)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "high_noise": load_expert,
    "low_noise": load_expert,
    "vae": lambda path: load_vae([path]),
    "text_encoder": lambda path: load_text_encoder([path]),
}
"""What a rank does with a file, by the field of the model that names it."""


def mutants(state: State) -> dict[str, State]:
    """One change each to what a header says: of some tensors of every kind."""
    found: dict[str, State] = {"nothing": {}, "another model": {"x.weight": torch.zeros(3)}}
    kinds: dict[tuple[int, str], list[str]] = {}
    # What the tokenizer's bytes mean, no header says.
    for name, tensor in ((name, tensor) for name, tensor in state.items() if name != "spiece_model"):
        kinds.setdefault((tensor.dim(), name.rpartition(".")[2]), []).append(name)
    for names in kinds.values():
        for name in {names[0], names[-1]}:
            tensor = state[name]
            found[f"without {name}"] = {other: value for other, value in state.items() if other != name}
            if tensor.dim():
                grown = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
                found[f"{name} longer"] = state | {name: grown}
                wider = torch.zeros(2 * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype)
                found[f"{name} twice"] = state | {name: wider}
                found[f"{name} deeper"] = state | {name: tensor[None].clone()}
                found[f"{name} empty"] = state | {name: tensor[:0].clone()}
            for dtype in (torch.int8, torch.uint8, torch.int64, torch.complex64):
                found[f"{name} {dtype}"] = state | {name: torch.zeros(tensor.shape, dtype=dtype)}
            layer = name.removesuffix(".weight")
            if layer != name:
                for scale in (torch.ones(5), torch.ones(tensor.shape[0], 2), torch.ones(2, dtype=torch.uint8)):
                    found[f"{name} scaled {list(scale.shape)}"] = state | {f"{layer}.weight_scale": scale}
                says = json.dumps({"format": "int8_tensorwise", "convrot": True}).encode()
                quant = torch.frombuffer(bytearray(says), dtype=torch.uint8)
                found[f"{name} rotated"] = state | {f"{layer}.comfy_quant": quant}
    return found


@pytest.mark.parametrize("field", LOADERS)
def test_fault_21_what_a_loader_refuses_was_refused_before(tiny_models: Path, tmp_path: Path, field: str) -> None:
    model = tiny_job(tiny_models).model
    state = load_file(getattr(model, field)[0].path)
    path, refused = tmp_path / "m.safetensors", 0
    for change, mutant in mutants(state).items():
        path.unlink(missing_ok=True)
        save_file(mutant, path)
        before = preflight(dataclasses.replace(model, **{field: (FileIdentity.of(path),)}))
        try:
            LOADERS[field](path)
        except (ValueError, OSError) as error:
            refused += 1
            assert before is not None, f"{change}: only the loader says {error}"
            assert str(path) in before, change
    assert refused > 20


def test_fault_21_what_a_lora_is_refused_for_was_refused_before(tiny_models: Path, tmp_path: Path) -> None:
    model = tiny_job(tiny_models).model
    targets = Checkpoint([model.high_noise[0].path]).shapes
    q = "blocks.0.self_attn.q"
    rows, columns = targets[f"{q}.weight"]
    good = {f"{q}.lora_up.weight": torch.ones(rows, 2), f"{q}.lora_down.weight": torch.ones(2, columns)}
    path, refused = tmp_path / "l.safetensors", 0
    for change, mutant in mutants(good | {f"{q}.alpha": torch.tensor(2.0)}).items():
        path.unlink(missing_ok=True)
        save_file(mutant, path)
        lora = LoraFile(file=FileIdentity.of(path), strength=1.0)
        before = preflight(dataclasses.replace(model, high_noise_loras=(lora,)))
        try:
            Lora(path, 1.0, targets, expert="high_noise")
        except (ValueError, OSError) as error:
            refused += 1
            assert before is not None, f"{change}: only the loader says {error}"
    assert refused > 10


SINGLE = dataclasses.replace(TINY, dim=128, num_heads=1)
"""Of a single file, which says no other number of heads."""
VARIANTS = {
    "VACE": (dataclasses.replace(TINY_VACE, dim=128, num_heads=1, num_layers=4, vace_layers=(0, 2)), "vace"),
    "FLF2V": (
        dataclasses.replace(SINGLE, in_dim=36, parts=frozenset({"img_emb", "emb_pos"}), clip_dim=64),
        "img",
    ),
}
"""Variant -> its sizes, and what its own tensors' names have in them."""


def model_door(path: Path, *loras: LoraFile) -> str | None:
    """What is said of a file that ComfyUI's own samplers are to run, before anything starts."""
    try:
        check_forwards([FileIdentity.of(path)], loras, "high_noise", Parallel(gpu_count=1))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("variant", VARIANTS)
def test_fault_21_what_is_refused_behind_the_model_door_was_refused_at_it(tmp_path: Path, variant: str) -> None:
    config, own = VARIANTS[variant]
    state, path, refused = random_weights(config), tmp_path / "m.safetensors", 0
    of_variant = {name: tensor for name, tensor in state.items() if own in name or "emb_pos" in name}
    assert len(of_variant) > 2
    for change, mutant in mutants(of_variant).items():
        # What is taken away is taken from the whole.
        whole = {} if "another" in change else {name: state[name] for name in state.keys() - of_variant.keys()}
        path.unlink(missing_ok=True)
        save_file(whole | mutant, path)
        before = model_door(path)
        try:
            load_expert(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert before is not None, f"{change}: only the loader says {error}"
            assert str(path) in before, change
        else:
            assert before is None, change
    assert refused > 20


@pytest.mark.parametrize("family", ["LoHa", "LoKr, factored", "DoRA", "OFT, rescaled", "differences"])
def test_fault_21_what_merging_a_lora_would_find_was_refused_before(tmp_path: Path, family: str) -> None:
    """At both doors; what they let pass is merged into every row."""
    model, path, refused = tmp_path / "m.safetensors", tmp_path / "l.safetensors", 0
    save_file(random_weights(dataclasses.replace(SINGLE, dim=256, num_heads=2, ffn_dim=80)), model)
    checkpoint = Checkpoint([model])
    module = "blocks.0.ffn.0"
    rows, columns = checkpoint.shapes[f"{module}.weight"]
    for change, mutant in mutants(of_family(family, rows, columns)).items():
        path.unlink(missing_ok=True)
        save_file({f"{module}.{name}": tensor for name, tensor in mutant.items()}, path)
        before = model_door(model, LoraFile(file=FileIdentity.of(path), strength=1.0))
        try:
            lora = Lora(path, 1.0, checkpoint.shapes, expert="high_noise")
            names = list(lora.updates)
            made = empty_model(checkpoint, torch.float32, [lora]).to_empty(device="cpu")
            read_weights(made, checkpoint, names, device=torch.device("cpu"), loras=[lora])
        except (ValueError, OSError) as error:
            refused += 1
            assert before is not None, f"{change}: only merging says {error}"
        else:
            assert before is None, change
    assert refused > 5


def of_family(family: str, rows: int, columns: int) -> State:
    """A module's tensors of one family of LoRA, that fit its weight."""
    ones = torch.ones
    return {
        "LoHa": {
            "hada_w1_a": ones(rows, 2), "hada_w1_b": ones(2, columns),
            "hada_w2_a": ones(rows, 2), "hada_w2_b": ones(2, columns), "alpha": torch.tensor(1.0),
        },
        "LoKr, factored": {
            "lokr_w1": ones(4, 4), "lokr_w2_a": ones(rows // 4, 2), "lokr_w2_b": ones(2, columns // 4),
            "alpha": torch.tensor(1.0),
        },
        "DoRA": {
            "lora_up.weight": ones(rows, 2), "lora_down.weight": ones(2, columns), "dora_scale": ones(rows, 1),
            "alpha": torch.tensor(1.0),
        },
        "OFT, rescaled": {"oft_blocks": torch.zeros(rows // 16, 16, 16), "rescale": ones(rows, 1)},
        "differences": {"diff": ones(rows, columns), "diff_b": ones(rows)},
    }[family]  # fmt: skip


def preflight(model: ModelFiles) -> str | None:
    """What it says; None where it lets the model pass."""
    try:
        check_model(model)
    except ValueError as error:
        return str(error)
    return None
