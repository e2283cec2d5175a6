"""LoRA lists as our node and ComfyUI-WanVideoWrapper's nodes make them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from node_inputs import identity, model_files, sampling, use_model_folders
from wan_pack.distributed.job.job import LoraFile
from wan_pack.nodes.models.loras import WanVideoDistributedLora, lora_files, lora_warnings, refreshed
from wan_pack.wan.model.selection import Selection


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`, with two LoRAs."""
    use_model_folders(tmp_path, monkeypatch)
    for name in ("fox.safetensors", "wan/snow.safetensors"):
        identity(tmp_path / "loras" / name)
    return tmp_path


def entry(folders: Path, **values: Any) -> dict[str, Any]:
    """As WanVideoLoraSelect makes it."""
    return {
        "path": str(folders / "loras" / "fox.safetensors"),
        "strength": 0.5,
        "name": "fox",
        "blocks": {},
        "layer_filter": "",
        "low_mem_load": False,
        "merge_loras": True,
        **values,
    }


def test_node_makes_the_list_that_the_wrapper_makes(folders: Path) -> None:
    (first,) = WanVideoDistributedLora().add("fox.safetensors", 0.5)
    assert first == [entry(folders)]
    (both,) = WanVideoDistributedLora().add("wan/snow.safetensors", -1.0, prev_lora=first)
    assert both == [
        *first,
        entry(folders, path=str(folders / "loras/wan/snow.safetensors"), strength=-1.0) | {"name": "wan/snow"},
    ]
    assert [Path(lora.file.path).name for lora in lora_files(both, "lora")] == ["fox.safetensors", "snow.safetensors"]
    assert len(first) == 1, "the list that came in is the other node's"


def test_node_runs_again_when_its_file_was_replaced(folders: Path) -> None:
    before = WanVideoDistributedLora.IS_CHANGED("fox.safetensors", strength=1.0)
    (folders / "loras" / "fox.safetensors").write_bytes(b"new")
    assert WanVideoDistributedLora.IS_CHANGED("fox.safetensors", strength=1.0) != before
    assert WanVideoDistributedLora.IS_CHANGED(None) == ""


def test_nothing_and_strength_0_are_no_lora(folders: Path) -> None:
    assert lora_files(None, "lora") == lora_files([], "lora") == ()
    assert lora_files([entry(folders, strength=0.0)], "lora") == ()


@pytest.mark.parametrize("path", ["fox.safetensors", "fox", "wan/snow"])
def test_bare_name_is_looked_up(folders: Path, path: str) -> None:
    (found,) = lora_files([entry(folders, path=path)], "lora")
    assert Path(found.file.path).is_absolute() and Path(path).stem in found.file.path


def test_of_files_that_a_bare_name_may_mean_it_is_always_the_same(folders: Path) -> None:
    """The first by its name; who means another one says its suffix."""
    identity(folders / "loras" / "fox.ckpt")
    for path, name in (("fox", "fox.ckpt"), ("fox.safetensors", "fox.safetensors")):
        (found,) = lora_files([entry(folders, path=path)], "lora")
        assert Path(found.file.path).name == name


@pytest.mark.parametrize(
    "values", [{"layer_filter": []}, {"low_mem_load": True, "merge_loras": False}, {"strength": 1}]
)
def test_what_makes_no_difference_is_taken(folders: Path, values: dict[str, Any]) -> None:
    assert len(lora_files([entry(folders, **values)], "lora")) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": [1.0, 0.5]}, "high_noise_lora: fox has a strength for each step.*give it one number"),
        ({"strength": "1"}, "strength of high_noise_lora: fox is '1'; it must be a number, -100 to 100"),
        ({"strength": True}, "is True; it must be a number, -100 to 100"),
        ({"strength": 10**5000}, "strength of high_noise_lora: fox is int .*; it must be -100 to 100"),
        ({"strength": float("nan")}, "is nan; it must be -100 to 100"),
        ({"strength": 1e9}, "is 1000000000.0; it must be -100 to 100"),
        ({"strength": []}, "fox has a strength for each step"),
        ({"blocks": {"double_blocks.0.": True}}, r"fox is limited to double_blocks\.0\.; it must be to some of blocks"),
        ({"blocks": {"blocks.0.": 1}}, "fox has dict for blocks; it must be from WanVideoLoraBlockEdit"),
        ({"blocks": ["blocks.0."]}, "fox has list for blocks"),
        ({"layer_filter": "attn"}, "fox is limited to no blocks; it must be to some"),
        ({"blocks": {"blocks.0.": True}, "layer_filter": [3]}, "fox has list for layer_filter"),
        ({"blocks": {"blocks.0.": True}, "layer_filter": ["x" * 201]}, "without is .*of 1 to 200 characters"),
        (
            {"path": "missing"},
            "path of high_noise_lora: fox is 'missing'; it must be a file that ComfyUI .*loras",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(folders: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_files([entry(folders, **values)], "high_noise_lora")


def test_blocks_and_layers_are_selected_as_the_wrappers_node_says_it(folders: Path) -> None:
    blocks = {f"blocks.{number}.": True for number in (11, 2, 0)}
    (found,) = lora_files([entry(folders, blocks=blocks, layer_filter=["", "ffn"])], "lora")
    assert found.selection == Selection((0, 2, 11), ("ffn",)) and str(found.selection) == "blocks 0, 2, 11; without ffn"
    (found,) = lora_files([entry(folders, blocks={}, layer_filter=[""])], "lora")
    assert found.selection == Selection()


def test_one_strength_for_every_step_is_one_number(folders: Path) -> None:
    (found,) = lora_files([entry(folders, strength=[0.5, 0.5, 0.5])], "lora")
    assert found.strength == 0.5


@pytest.mark.parametrize("value", ["fox", [{"strength": 1.0}], [("fox", 1.0)]])
def test_what_is_no_lora_list_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="must be from Wan Video Distributed Lora"):
        lora_files(value, "high_noise_lora")


STRENGTHS = {"high_noise_loras": 0.25, "low_noise_loras": 0.5}


def test_lora_that_was_replaced_is_taken_as_it_is_now(folders: Path) -> None:
    path = folders / "loras" / "fox.safetensors"
    loras = {side: (LoraFile(file=identity(path), strength=strength),) for side, strength in STRENGTHS.items()}
    model = dataclasses.replace(model_files(folders), **loras)
    path.write_bytes(b"new")
    os.utime(path, ns=(1, 1))
    now = refreshed(model)
    for side, strength in STRENGTHS.items():
        (lora,) = getattr(now, side)
        lora.file.check_unchanged()
        assert lora.strength == strength
    assert dataclasses.replace(now, **loras) == model


@pytest.mark.parametrize(
    ("file", "guidance", "warns"),
    [
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", 3.0, True),
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors", 3.0, True),
        ("lightx2v_T2V_14B_cfg_step_distill_v2.safetensors", 3.0, True),
        ("Wan21_CausVid_14B.safetensors", 3.0, True),
        ("Wan21_AccVid_T2V.safetensors", 3.0, True),
        ("Wan2.1_T2V_14B_FusionX_LoRA.safetensors", 3.0, True),
        ("FastWan_T2V_14B_480p_lora_rank_128.safetensors", 3.0, True),
        ("Wan2_2_5B_Turbo_lora.safetensors", 3.0, True),
        ("wan2.2-rapid-mega-aio-v12.safetensors", 3.0, True),
        ("Wan21_Self_Forcing_rank64.safetensors", 3.0, True),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", 1.0, False),
        ("fox.safetensors", 3.0, False),
        ("porsche_turbo_high_noise.safetensors", 3.0, False),
        ("rapid_motion.safetensors", 3.0, False),
        ("fox_14steps.safetensors", 3.0, False),
    ],
)
def test_guidance_with_a_distilled_lora_is_warned_of(folders: Path, file: str, guidance: float, warns: bool) -> None:
    lora = LoraFile(file=identity(folders / "loras" / file), strength=1.0)
    model = dataclasses.replace(model_files(folders / "models"), high_noise_loras=(lora,))
    found = list(lora_warnings(model, sampling(guidance_high=guidance, guidance_low=9.0)))
    assert len(found) == warns
    if warns:
        assert found[0].startswith(f"guidance_high is 3, but {Path(file).name} looks distilled")


@pytest.mark.parametrize(
    ("experts", "loras", "told"),
    [
        (("t2v_high", "t2v_low"), ("fox_high_noise", "fox_low_noise"), []),
        (("t2v_high", "t2v_low"), ("fox", "cat"), []),
        (("t2v_high", "t2v_low"), ("fox_low_noise", "fox_high_noise"), ["fox_low_noise", "fox_high_noise"]),
        (("t2v_high", "t2v_low"), ("fox_low_noise", ""), ["fox_low_noise"]),
        (("a", "b"), ("fox_high_noise", "fox_high_noise"), ["fox_high_noise"]),
        # That the experts are swapped is said otherwise.
        (("t2v_low", "t2v_high"), ("fox_low_noise", "fox_high_noise"), []),
        (("t2v_low", ""), ("fox_high_noise", ""), ["fox_high_noise"]),
        (("ti2v_5B", ""), ("fox_high_noise", ""), []),
    ],
)
def test_a_lora_of_the_other_expert_is_warned_of(
    folders: Path, experts: tuple[str, str], loras: tuple[str, str], told: list[str]
) -> None:
    high, low = ((identity(folders / "models" / "wan" / f"{name}.safetensors"),) if name else () for name in experts)
    added = [
        (LoraFile(file=identity(folders / "loras" / f"{name}.safetensors"), strength=1.0),) if name else ()
        for name in loras
    ]
    model = dataclasses.replace(
        model_files(folders / "models"), high_noise=high, low_noise=low, high_noise_loras=added[0],
        low_noise_loras=added[1],
    )  # fmt: skip
    found = list(lora_warnings(model, sampling()))
    assert [line.partition(".")[0] for line in found] == told
    if experts == ("t2v_high", "t2v_low") and len(told) == 2:
        assert found[1] == (
            "fox_high_noise.safetensors looks like a LoRA of the high-noise expert, and is merged into the low-noise "
            "one, t2v_low.safetensors"
        )
