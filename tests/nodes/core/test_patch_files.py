"""LoRA files of what nodes add to a model's weights, without ComfyUI: what is written, and what no file can say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from wan_pack.nodes.core.patch_files import KEPT, PatchFiles
from wan_pack.nodes.host.core_model import AddedPatches

LAYERS = [f"blocks.{number}.ffn.0" for number in range(2)]
UP, DOWN = torch.randn(6, 2), torch.randn(2, 4)


def added(patches: Any, strength: float = 1.0, model_strength: float = 1.0) -> AddedPatches:
    return AddedPatches(patches, strength, model_strength)


def of_layers(*layers: str, up: Any = UP, down: Any = DOWN, alpha: Any = 2.0) -> dict[str, Any]:
    weights = (up, down, alpha, None, None, None)
    return {f"diffusion_model.{layer}.weight": SimpleNamespace(name="lora", weights=weights) for layer in layers}


@pytest.fixture
def files(tmp_path: Path) -> PatchFiles:
    return PatchFiles(lambda: tmp_path / "new")


def test_tensors_are_written_as_they_are_wherever_they_lie(files: PatchFiles) -> None:
    """Two layers may share one tensor, and one may be a part of another or lie transposed."""
    whole = torch.randn(4, 8)
    (file,) = files.files([added(of_layers(*LAYERS, up=whole[:, :6].mT, down=whole[:2, 4:]), strength=0.5)])
    assert file.strength == 0.5
    written = load_file(file.file.path)
    assert written.keys() == {
        f"{layer}.{part}" for layer in LAYERS for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    for layer in LAYERS:
        assert torch.equal(written[f"{layer}.lora_up.weight"], whole[:, :6].mT)
        assert torch.equal(written[f"{layer}.lora_down.weight"], whole[:2, 4:])
        assert written[f"{layer}.alpha"].dtype == torch.float32 and float(written[f"{layer}.alpha"]) == 2.0
    assert [path.name for path in Path(file.file.path).parent.iterdir()] == [Path(file.file.path).name]


def test_files_are_the_same_where_all_is_the_same(files: PatchFiles) -> None:
    first = added(of_layers(LAYERS[0]))
    (known,) = files.files([first])
    others = [
        of_layers(LAYERS[1]), of_layers(LAYERS[0], alpha=3.0), of_layers(LAYERS[0], up=UP.half()),
        of_layers(LAYERS[0], up=UP.view(2, 6)), of_layers(LAYERS[0], up=UP + 1), of_layers(*LAYERS),
    ]  # fmt: skip
    names = {file.file.path for file in files.files([first, added(of_layers(LAYERS[0], up=UP.clone()))])}
    assert names == {known.file.path}
    kept = [added(patches) for patches in others]
    assert len({file.file.path for file in files.files(kept)} | names) == 1 + len(others)


def test_a_file_that_is_used_again_stays_whatever_is_freed_meanwhile(
    files: PatchFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may free another model's patches anywhere, on this thread too: then the file that was unused for longest
    goes."""
    alphas = [float(number) for number in range(KEPT + 1)]
    in_use = [added(of_layers(LAYERS[0], alpha=alpha)) for alpha in alphas]
    oldest = Path(files.files(in_use)[0].file.path)
    while len(in_use) > 1:
        del in_use[0]
    exists = Path.exists

    def freed_meanwhile(path: Path) -> bool:
        found = exists(path)
        if path == oldest:
            in_use.clear()
        return found

    again = added(of_layers(LAYERS[0], alpha=alphas[0]))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", freed_meanwhile)
        (file,) = files.files([again])
    assert not in_use and Path(file.file.path) == oldest and oldest.exists()


def test_a_file_whose_last_user_goes_as_the_next_one_comes_is_in_use(files: PatchFiles) -> None:
    in_use = [added(of_layers(LAYERS[0]))]
    (first,) = files.files(in_use)

    class Unused(dict[Path, None]):
        def pop(self, key: Path, *default: Any) -> Any:
            found = super().pop(key, *default)
            in_use.clear()
            return found

    files._unused = Unused()
    again = added(of_layers(LAYERS[0]))
    assert files.files([again]) == (first,)
    assert not in_use and not files._unused


def test_changes_that_are_no_product_have_their_own_names(files: PatchFiles) -> None:
    weight, bias = torch.randn(6, 4), torch.randn(6)
    name = f"diffusion_model.{LAYERS[0]}"
    patches = {f"{name}.weight": ("diff", (weight,)), f"{name}.bias": (bias,),
               "diffusion_model.blocks.0.modulation": ("diff", (weight,)),
               f"diffusion_model.{LAYERS[1]}.weight": ("set", (weight,))}  # fmt: skip
    (file,) = files.files([added(patches)])
    written = load_file(file.file.path)
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {
        f"{LAYERS[0]}.diff": (6, 4), f"{LAYERS[0]}.diff_b": (6,), "blocks.0.modulation.diff": (6, 4),
        f"{LAYERS[1]}.set_weight": (6, 4),
    }  # fmt: skip


def test_what_adds_nothing_is_no_file(files: PatchFiles, tmp_path: Path) -> None:
    assert files.files([added({}), added(of_layers(LAYERS[0]), strength=0.0)]) == ()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("patches", "strengths", "words"),
    [
        (of_layers(LAYERS[0]), (0.0, 0.5), "a node merges another model into this one"),
        ({("diffusion_model.a.weight", (0, 0, 8)): (UP,)}, (1.0, 1.0), "a node patches a part of a weight"),
        ({"first_stage.a.weight": (UP,)}, (1.0, 1.0), r"a node patches a part of a weight \(first_stage"),
        ({"diffusion_model.a.weight": ("new", (UP,))}, (1.0, 1.0), "a node changes a.weight by tuple"),
        ({"diffusion_model.a.bias": ("set", (UP,))}, (1.0, 1.0), "a node changes a.bias by tuple"),
        ({"diffusion_model.a.weight": ("diff", (3.0,))}, (1.0, 1.0), "a node changes a.weight by tuple"),
        ({"diffusion_model.a.weight": ("diff", UP)}, (1.0, 1.0), "a node changes a.weight by tuple"),
        ({"diffusion_model.a.weight": (3, (UP,))}, (1.0, 1.0), "a node changes a.weight by tuple"),
        (
            {"diffusion_model.a.weight": SimpleNamespace(name="lora", weights=(UP, DOWN))}, (1.0, 1.0),
            "a node changes a.weight by SimpleNamespace, which no LoRA file can say",
        ),
    ],
)  # fmt: skip
def test_what_no_file_can_say_is_refused(
    files: PatchFiles, patches: Any, strengths: tuple[float, float], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        files.files([added(patches, *strengths)])
    assert not (tmp_path / "new").exists()
