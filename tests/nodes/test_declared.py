"""Values of the wrong type or out of all bounds, in every input of every node: refused in words that are bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_inputs import inputs_of, settings, use_model_folders
from wan_pack.distributed.hosts.hostfile import read_hostfile
from wan_pack.distributed.job.errors import check, listed
from wan_pack.distributed.job.job import MAX_GPUS, FileIdentity, LoraFile, ModelFiles, Parallel
from wan_pack.distributed.job.model_files import MAX_FILES, MAX_LORAS
from wan_pack.distributed.machine.gpus import choose_gpus
from wan_pack.nodes import NODE_CLASS_MAPPINGS
from wan_pack.nodes.batch.requests import MAX_VIDEOS, requests_of
from wan_pack.nodes.host import host
from wan_pack.nodes.host.declared import MAX_TEXT, taken, value_of
from wan_pack.nodes.inference import saved_video
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.models.loras import WanVideoDistributedLora
from wan_pack.nodes.settings.spread import WanVideoDistributedConfig
from wan_pack.wan.files.model_folder import MAX_SHARDS, shard_files

WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING")
HUGE = 10**400
WRONG: dict[str, list[Any]] = {
    "INT": ["64x", "64", None, True, 1.5, float("nan"), float("inf"), HUGE, -HUGE, 10**5000, [], {}],
    "FLOAT": ["x", None, False, float("nan"), float("-inf"), HUGE, 10**5000, [1.0], 1j],
    "BOOLEAN": ["true", 1, None, [], 0.0],
    "STRING": [1, None, b"x", ["x"], "\ud800", "x" * (MAX_TEXT + 1)],
    "list": ["nowhere", None, 5, ["auto"], "x" * 1_000_000, "a\0b", "../x", "\udc80"],
}
LONGEST = 1500
"""Characters of a message."""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_model_folders(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_fault_32_every_widget_refuses_what_it_does_not_declare(node: Any) -> None:
    for name, entry in inputs_of(node).items():
        kind = "list" if isinstance(entry[0], list) else entry[0]
        for value in WRONG.get(kind, ()):
            with pytest.raises(ValueError) as refused:
                taken(node, {name: value})
            message = str(refused.value)
            assert message.startswith((f"{name} is ", f"{name} has ")) and "must" in message, message[:200]
            assert len(message) < LONGEST and message.isprintable()


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_fault_32_every_node_checks_what_it_is_given(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node's own function, not only the check: an input that is of another type, and one that it has not."""
    monkeypatch.setattr(host, "blocked_output", lambda: "blocked")
    function = getattr(node(), node.FUNCTION)
    with pytest.raises(ValueError, match="'no such input' is no input of this node"):
        function(**{"no such input": 1})
    for name in (name for name, entry in inputs_of(node).items() if entry[0] in WIDGETS):
        with pytest.raises(ValueError, match=f"^{name} is "):
            function(**{name: []})


@pytest.mark.parametrize("kind", ["WanVideoDistributedInference", "WanVideoDistributedBatch"])
def test_fault_32_a_wrong_value_is_returned_where_errors_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "blocked_output", lambda: "blocked")
    result = NODE_CLASS_MAPPINGS[kind]().run(width="64x", on_error="return")["result"]
    assert "error: width is '64x'; it must be a whole number, 16 to 8192" in result


def test_numbers_of_other_packs_become_ours() -> None:
    whole, real = ("INT", {"min": 0, "max": 9}), ("FLOAT", {"min": 0.0, "max": 9.0})
    assert [(value_of("n", whole, value), type(value_of("n", whole, value))) for value in (3, np.int64(3))] == [
        (3, int)
    ] * 2
    for value in (3, 3.0, np.float32(3), np.int8(3)):
        assert (value_of("n", real, value), type(value_of("n", real, value))) == (3.0, float)


@pytest.mark.parametrize("value", ["64x", None, HUGE, True, 1.5])
def test_fault_32_the_servers_own_check_takes_any_value(value: Any) -> None:
    """It runs on what ComfyUI could not convert, too."""
    assert WanVideoDistributedInference().check_lazy_status(width=value, height=64, model=None) == []
    answer = WanVideoDistributedConfig.VALIDATE_INPUTS(master_port=value)
    assert answer is True if value is None else "it must be" in str(answer) and len(str(answer)) < LONGEST


@pytest.mark.parametrize("extra", ["x", [1], {"a\0": 1}, {"\ud800": 1}])
def test_fault_32_what_comes_with_a_prompt_is_checked_before_the_video(extra: Any) -> None:
    with pytest.raises(ValueError, match=r"^extra_pnginfo is .*; it must be an object"):
        WanVideoDistributedInference().run(**settings(), extra_pnginfo=extra)
    with pytest.raises(ValueError, match="the node's id is"):
        WanVideoDistributedInference().run(**settings(), unique_id="\ud800")


@pytest.mark.parametrize("prefix", ["a\0b", "a\0/b", "a\nb/c", "x" * 1_000_000, "\0"])
def test_fault_32_a_prefix_says_what_is_wrong_with_it(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"^filename_prefix is .*; it must have at most 1000 characters, no control"):
        saved_video.check_prefix(prefix, 64, 48, ".mp4")


def test_fault_32_messages_quote_in_bounds() -> None:
    for value in (HUGE, 10**5000, "x" * 1_000_000, ["x" * 999] * 999, {"x" * 999: ["y"] * 999}, b"\0", "\ud800\n"):
        with pytest.raises(ValueError) as refused:
            check(False, "field", value, "small")
        assert len(str(refused.value)) < 600 and str(refused.value).isprintable()
        assert len(listed([value] * 1000)) < 10_000


# Lists that come from outside


def a_file(name: str = "a") -> FileIdentity:
    return FileIdentity(path=f"/{name}", size=1, mtime_ns=1)


def test_fault_32_loras_of_an_expert_are_bounded(folders: Path) -> None:
    (folders / "loras").mkdir()
    (folders / "loras" / "fox.safetensors").touch()
    entries: list[Any] = [{"path": "fox", "strength": 1.0}] * (MAX_LORAS - 1)
    node = WanVideoDistributedLora()
    (full,) = node.add("fox.safetensors", 1.0, entries)
    assert len(full) == MAX_LORAS
    with pytest.raises(ValueError, match=f"holds {MAX_LORAS + 1} LoRAs; it must hold at most {MAX_LORAS} LoRAs per"):
        node.add("fox.safetensors", 1.0, full)
    model = {"high_noise": (a_file(),), "low_noise": (), "vae": (a_file(),)}
    lora = LoraFile(file=a_file(), strength=1.0)
    ModelFiles(**model, high_noise_loras=(lora,) * MAX_LORAS)
    with pytest.raises(ValueError, match=rf"model.high_noise_loras holds {MAX_LORAS + 1} LoRAs; .* at most"):
        ModelFiles(**model, high_noise_loras=(lora,) * (MAX_LORAS + 1))


def test_fault_32_files_of_a_model_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.vae is {MAX_FILES + 1}; it must be at most {MAX_FILES} files"):
        ModelFiles(high_noise=(a_file(),), low_noise=(), vae=(a_file(),) * (MAX_FILES + 1))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(MAX_SHARDS + 1)}}))
    with pytest.raises(ValueError, match=f"names {MAX_SHARDS + 1} files; at most {MAX_SHARDS} are allowed"):
        shard_files(index)


def test_fault_32_gpus_are_bounded() -> None:
    with pytest.raises(ValueError, match=f"^gpu_ids is .*; it must be at most {MAX_GPUS} GPUs") as refused:
        choose_gpus(0, ",".join(map(str, range(100_000))))
    assert len(str(refused.value)) < LONGEST
    for gpu in ("0\0", "\ud800", "0;id", "-1", "0" * 101, ""):
        with pytest.raises(ValueError, match=r"^gpu_ids is .*; it must be indices of nvidia-smi or UUIDs"):
            Parallel(gpu_count=1, gpu_ids=(gpu,))


def test_fault_32_machines_of_a_hostfile_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("".join(f"h{n} slots=1\n" for n in range(MAX_GPUS + 1)))
    with pytest.raises(ValueError, match=f"names more than {MAX_GPUS} machines"):
        read_hostfile(file)
    file.write_text("".join(f"h{'x' * 900}{n} slots={n}\n" for n in range(60)))
    with pytest.raises(ValueError, match="different slots") as refused:
        read_hostfile(file)
    assert len(str(refused.value)) < 10_000


def test_fault_32_videos_of_a_batch_are_bounded() -> None:
    prompts = "\n".join(map(str, range(MAX_VIDEOS // 100)))
    assert len(requests_of(prompts, 0, 100, embeds_connected=False)) == MAX_VIDEOS
    with pytest.raises(ValueError, match=f"11 prompts and batch_count 100 make 1100 videos; .* at most {MAX_VIDEOS}"):
        requests_of(prompts + "\none more", 0, 100, embeds_connected=False)
