"""What a header's config and a config.json say that a model is, where its tensors are those of another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from single_files import SINGLE
from tiny import TINY, random_weights, write_official
from wan_pack.wan.checkpoint.checkpoint import Checkpoint, checkpoint_files
from wan_pack.wan.checkpoint.config_texts import CAUSAL, FIXED, OTHERS, TYPES

GOOD = [
    {}, {"vae": {"model_type": "animate2"}}, {"transformer": {}}, {"transformer": "another's"}, [], "words", 3,
    {"transformer": {"patch_size": [1, 2, 2], "eps": 1e-6, "qk_norm": True, "cross_attn_norm": True, "text_len": 512}},
    {"transformer": {CAUSAL: False, "unknown": 1}},
    *({"transformer": {"model_type": kind}} for kind in sorted(TYPES)),
]  # fmt: skip


def with_header(folder: Path, config: object) -> Checkpoint:
    text = config if isinstance(config, str) and config.startswith("{") else json.dumps(config)
    save_file(random_weights(SINGLE), folder / "m.safetensors", metadata={"config": text, "other": "words"})
    return Checkpoint([folder / "m.safetensors"])


@pytest.mark.parametrize("config", GOOD, ids=map(str, GOOD))
def test_what_a_header_says_of_a_model_that_runs_changes_nothing(tmp_path: Path, config: object) -> None:
    assert with_header(tmp_path, config).config == SINGLE


@pytest.mark.parametrize("where", ["header", "config.json"])
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_a_forward_of_its_own_is_refused_by_its_name(tmp_path: Path, kind: str, where: str) -> None:
    """Its tensors alone would be taken for those of T2V, and make a video of nothing."""
    with pytest.raises(ValueError, match=r"expected a Wan transformer \(T2V, ") as refusal:
        opened(tmp_path, {"model_type": kind}, where)
    assert f"it is {OTHERS[kind]}, as " in str(refusal.value) and f" says ({kind});" in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("where", ["header", "config.json"])
def test_a_model_that_goes_frame_by_frame_is_refused(tmp_path: Path, where: str) -> None:
    for says in ({CAUSAL: True}, {CAUSAL: True, "model_type": "t2v"}):
        with pytest.raises(ValueError, match=r"a causal Wan transformer, .*says \(causal_ar\); expected a Wan"):
            opened(tmp_path, says, where)


@pytest.mark.parametrize("where", ["header", "config.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("patch_size", [1, 4, 4]), ("eps", 1e-5), ("text_len", 226), ("cross_attn_norm", False), ("qk_norm", False)],
)
def test_what_all_of_them_have_is_not_otherwise(tmp_path: Path, key: str, value: object, where: str) -> None:
    assert key in FIXED
    with pytest.raises(ValueError, match=rf"says {key} .*; expected .*, as a Wan transformer \(") as refusal:
        opened(tmp_path, {key: value}, where)
    assert str(value) in str(refusal.value)


def test_a_header_says_the_heads_before_a_config_beside_it_does(tmp_path: Path) -> None:
    """As ComfyUI takes them; the config may be another file's."""
    for heads in (1, 2):
        assert opened(tmp_path, {"num_heads": heads}, "header").config.num_heads == heads
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2}))
    assert opened(tmp_path, {}, "header").config.num_heads == 2
    assert opened(tmp_path, {"num_heads": 1}, "header").config.num_heads == 1
    for heads in (0, "2", True, None):
        with pytest.raises(ValueError, match=r"its header: num_heads is .*; it must be a positive number"):
            opened(tmp_path, {"num_heads": heads}, "header")


def test_a_config_of_another_model_in_the_same_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"config\.json beside it \(which must lie elsewhere if it is another model's\)"
    ):
        opened(tmp_path, {"model_type": "humo"}, "config.json")


@pytest.mark.parametrize("kind", ["t3v", "", 3, ["t2v"], {"t2v": 1}], ids=str)
def test_a_type_that_nobody_knows_is_refused_where_comfyui_goes_by_it(tmp_path: Path, kind: object) -> None:
    with pytest.raises(ValueError, match=r"its header says that it is of model_type .*, not one of animate, camera"):
        opened(tmp_path, {"model_type": kind}, "header")
    assert opened(tmp_path, {"model_type": kind}, "config.json").config.num_heads == TINY.num_heads


@pytest.mark.parametrize("text", ['{"transformer": ', '{"transformer": {"eps": 1, "eps": 2}}', "{" + "[" * 40])
def test_a_header_whose_config_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"m\.safetensors: its header has a config that cannot be read: "):
        with_header(tmp_path, text)


def test_one_of_many_shards_is_enough_to_say_it(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "m", random_weights(), shards=2)
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(last), last, metadata={"config": json.dumps({"transformer": {"model_type": "animate2"}})})
    with pytest.raises(ValueError, match="it is a Wan Animate 2 transformer"):
        Checkpoint(checkpoint_files(folder))


def opened(folder: Path, says: dict[str, object], where: str) -> Checkpoint:
    if where == "header":
        return with_header(folder, {"transformer": says})
    folder = write_official(folder / "m", random_weights())
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": TINY.num_heads} | says))
    return Checkpoint(checkpoint_files(folder))
