"""The nodes without ComfyUI: what they declare, and how they turn inputs into a job."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_pack.demo.tiny_model import write_comfyui_files, write_official_folder
from wan_pack.distributed.job import FileIdentity, ModelFiles
from wan_pack.nodes import DISPLAY_NAMES, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, embeds, host, node_classes
from wan_pack.nodes import inference as inference_module
from wan_pack.nodes.config import DistributedConfig, WanVideoDistributedConfig
from wan_pack.nodes.inference import WanVideoDistributedInference
from wan_pack.nodes.loaders import LoadWanVideoModel
from wan_pack.nodes.status import Status

ROOT = Path(__file__).resolve().parent.parent
TEXT_NODES = {"LoadWanVideoT5TextEncoder", "WanVideoTextEncode"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`."""

    def model_files(key: str) -> list[str]:
        root = tmp_path / key
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

    monkeypatch.setattr(host, "model_folders", lambda key: [tmp_path / key])
    monkeypatch.setattr(host, "model_files", model_files)
    monkeypatch.setattr(host, "model_path", lambda key, name: tmp_path / key / name)
    return tmp_path


def inputs_of(node: type) -> dict[str, tuple[Any, dict[str, Any]]]:
    types = node.INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_node_declares_everything_a_user_reads(node: Any, folders: Path) -> None:
    assert node.DESCRIPTION.endswith(".")
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert all(node.OUTPUT_TOOLTIPS)
    for name, (_, options) in inputs_of(node).items():
        assert options.get("tooltip"), f"{node.__name__}.{name} has no tooltip"
    assert (ROOT / "web" / "docs" / f"{node.__name__}.md").is_file()
    assert NODE_DISPLAY_NAME_MAPPINGS[node.__name__] == DISPLAY_NAMES[node.__name__]


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_node_function_takes_its_inputs(node: Any, folders: Path) -> None:
    names = [*inputs_of(node), *node.INPUT_TYPES().get("hidden", {})]
    inspect.signature(getattr(node, node.FUNCTION)).bind(None, **dict.fromkeys(names))


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_lists_are_lists_that_the_server_checks(node: Any, folders: Path) -> None:
    for name, (kind, options) in inputs_of(node).items():
        assert kind != "COMBO", f"{name}: the server does not check a COMBO"
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name


def test_text_nodes_come_as_a_pair_or_not_at_all() -> None:
    assert set(node_classes(frozenset())) >= TEXT_NODES
    for taken in TEXT_NODES:
        assert not TEXT_NODES & set(node_classes(frozenset({taken})))
        assert "WanVideoDistributedInference" in node_classes(frozenset({taken}))


def test_text_nodes_have_the_sockets_of_the_pack_they_replace(folders: Path) -> None:
    loader, encode = (NODE_CLASS_MAPPINGS[name] for name in ("LoadWanVideoT5TextEncoder", "WanVideoTextEncode"))
    assert list(loader.INPUT_TYPES()["required"]) == ["model_name", "precision"]
    assert loader.INPUT_TYPES()["required"]["precision"][0] == ["fp32", "bf16"]
    assert (loader.RETURN_TYPES, loader.RETURN_NAMES) == (("WANTEXTENCODER",), ("wan_t5_model",))
    assert list(encode.INPUT_TYPES()["required"]) == ["positive_prompt", "negative_prompt"]
    assert encode.INPUT_TYPES()["optional"]["t5"][0] == "WANTEXTENCODER"
    assert (encode.RETURN_TYPES, encode.RETURN_NAMES) == (("WANVIDEOTEXTEMBEDS",), ("text_embeds",))


def test_inference_inputs_keep_their_order() -> None:
    # Saved workflows hold values by position: a new input may only come at the end.
    assert list(inputs_of(WanVideoDistributedInference)) == [
        *("model", "prompt", "width", "height", "num_frames", "sample_steps"),
        *("gpu_count", "use_ulysses", "use_fsdp", "offload_model"),
        *("text_embeds", "config", "negative_embeds", "negative_prompt", "seed", "scheduler", "shift"),
        *("guidance_low", "guidance_high", "boundary", "fps", "filename_prefix", "on_error"),
    ]
    assert WanVideoDistributedInference.RETURN_NAMES == ("video_path", "log_output", "status", "video", "samples")


def test_import_is_light_and_has_no_side_effects(tmp_path: Path) -> None:
    script = (
        "import importlib.util, json, sys\n"
        f"root = {str(ROOT)!r}\n"
        "before = list(sys.path)\n"
        "spec = importlib.util.spec_from_file_location('p', root + '/__init__.py', submodule_search_locations=[root])\n"
        "sys.modules['p'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert sys.path == before\n"
        "print(json.dumps([n for n in ('torch', 'diffusers', 'transformers', 'deepspeed') if n in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == []
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


# Embeddings


def rows(n: int, padding: int = 0, dim: int = 8) -> torch.Tensor:
    return torch.cat([torch.ones(n, dim), torch.zeros(padding, dim)])


@pytest.mark.parametrize(
    "value",
    [
        {"prompt_embeds": [rows(5)]},
        {"prompt_embeds": [rows(5, 507)], "negative_prompt_embeds": None, "echoshot": False},
        {"prompt_embeds": rows(5, 507)[None]},
        {"prompt_embeds": rows(5)},
        [[rows(5, 507)[None], {"pooled_output": None}]],
        [(rows(5, 507)[None], {})],
    ],
    ids=["list", "padded list", "batch", "matrix", "conditioning", "conditioning tuple"],
)
def test_every_form_of_embedding_is_read(value: Any) -> None:
    found = embeds.prompt_of(value, "text_embeds")
    assert torch.equal(found.tokens, rows(5))
    assert found.notes == ()


def test_an_embedding_of_nothing_keeps_one_row() -> None:
    assert embeds.prompt_of([[torch.zeros(1, 512, 8), {}]], "text_embeds").tokens.shape == (1, 8)


def test_long_embedding_is_cut_and_the_user_told() -> None:
    found = embeds.prompt_of([[rows(600)[None], {}]], "text_embeds")
    assert found.tokens.shape == (512, 8)
    assert found.notes == ("text_embeds has 600 tokens; it was cut to 512, which is what the model takes",)


def test_more_than_one_conditioning_entry_is_said() -> None:
    found = embeds.prompt_of([[rows(3)[None], {}], [rows(4)[None], {}]], "text_embeds")
    assert len(found.tokens) == 3
    assert found.notes == ("text_embeds has 2 conditioning entries; the first one is used",)


def test_what_is_not_used_is_said() -> None:
    found = embeds.prompt_of([[rows(3)[None], {"concat_latent_image": 1, "pooled_output": None}]], "text_embeds")
    assert found.notes == ("text_embeds carries concat_latent_image, which text to video does not use",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt_embeds": [rows(3), rows(4)]}, 'holds 2 prompts; this node takes one. A "|"'),
        ({"prompt_embeds": []}, "holds 0 prompts"),
        ({"negative_prompt_embeds": [rows(3)]}, "holds no prompt embedding"),
        ({"prompt_embeds": [torch.ones(3)]}, r"has the shape \[3\]"),
        ([], "it must be WANVIDEOTEXTEMBEDS or CONDITIONING"),
        ("a prompt", "text_embeds is str"),
    ],
)
def test_what_is_no_prompt_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embeds.prompt_of(value, "text_embeds")


def test_negative_comes_from_the_wrapper_dict_only() -> None:
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    found = embeds.negative_of(both, "text_embeds")
    assert found is not None and len(found.tokens) == 4
    assert embeds.negative_of({"prompt_embeds": [rows(3)]}, "text_embeds") is None
    assert embeds.negative_of([[rows(3)[None], {}]], "text_embeds") is None


# Model files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    write_comfyui_files(models)
    write_official_folder(models / "wan" / "Wan2.2-T2V-A14B")
    return models


@pytest.fixture
def loader_folders(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "model_folders", lambda key: [tiny / key])
    monkeypatch.setattr(
        host,
        "model_files",
        lambda key: sorted(path.name for path in (tiny / key).iterdir()) if (tiny / key).is_dir() else [],
    )
    monkeypatch.setattr(host, "model_path", lambda key, name: tiny / key / name)
    return tiny


def test_official_folders_are_listed_beside_files(loader_folders: Path) -> None:
    inputs = inputs_of(LoadWanVideoModel)
    experts, options = inputs["high_noise"]
    assert experts == [
        "tiny_wan2.2_t2v_high_noise.safetensors",
        "tiny_wan2.2_t2v_low_noise.safetensors",
        "Wan2.2-T2V-A14B/high_noise_model",
        "Wan2.2-T2V-A14B/low_noise_model",
    ]
    assert options["default"] == experts[0]
    assert inputs["low_noise"][1]["default"] == experts[1]
    assert inputs["vae"][0] == ["tiny_wan_2.1_vae.safetensors", "Wan2.2-T2V-A14B/Wan2.1_VAE.pth"]
    assert inputs["text_encoder"][0] == [
        "none",
        "tiny_umt5.safetensors",
        "Wan2.2-T2V-A14B/models_t5_umt5-xxl-enc-bf16.pth",
    ]


def test_official_folder_gives_every_shard_and_the_tokenizer(loader_folders: Path) -> None:
    folder = "Wan2.2-T2V-A14B"
    (model,) = LoadWanVideoModel().load(
        f"{folder}/high_noise_model",
        f"{folder}/low_noise_model",
        f"{folder}/Wan2.1_VAE.pth",
        f"{folder}/models_t5_umt5-xxl-enc-bf16.pth",
    )
    assert [Path(part.path).name for part in model.high_noise] == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ]
    assert [Path(part.path).name for part in model.tokenizer] == ["spiece.model"]


def test_missing_shard_is_named(loader_folders: Path) -> None:
    folder = loader_folders / "wan" / "Wan2.2-T2V-A14B" / "low_noise_model"
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    hidden = shard.rename(shard.with_suffix(".hidden"))
    try:
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model-00002-of-00002.safetensors"):
            LoadWanVideoModel().load(
                "tiny_wan2.2_t2v_high_noise.safetensors",
                "Wan2.2-T2V-A14B/low_noise_model",
                "tiny_wan_2.1_vae.safetensors",
            )
    finally:
        hidden.rename(shard)


def test_loader_runs_again_when_a_file_changes(loader_folders: Path) -> None:
    names = {
        "high_noise": "tiny_wan2.2_t2v_high_noise.safetensors",
        "low_noise": "tiny_wan2.2_t2v_low_noise.safetensors",
        "vae": "tiny_wan_2.1_vae.safetensors",
    }
    before = LoadWanVideoModel.IS_CHANGED(**names)
    assert LoadWanVideoModel.IS_CHANGED(**names) == before
    (loader_folders / "vae" / names["vae"]).touch()
    assert LoadWanVideoModel.IS_CHANGED(**names) != before


def test_wrong_kind_of_file_is_refused(loader_folders: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny_wan2\.2_t2v_low_noise\.safetensors.*VAE"):
        wrong = loader_folders / "vae" / "tiny_wan2.2_t2v_low_noise.safetensors"
        wrong.write_bytes((loader_folders / "diffusion_models" / wrong.name).read_bytes())
        try:
            LoadWanVideoModel().load("tiny_wan2.2_t2v_high_noise.safetensors", wrong.name, wrong.name)
        finally:
            wrong.unlink()


# The job


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    (tmp_path / "file").write_bytes(b"x")
    identity = FileIdentity.of(tmp_path / "file")
    return ModelFiles(high_noise=(identity,), low_noise=(identity,), vae=(identity,))


def settings(**values: Any) -> dict[str, Any]:
    """The node's inputs as ComfyUI passes them: defaults, then `values`."""
    defaults = {name: options["default"] for name, (_, options) in _widgets().items()}
    return {**defaults, **values}


def _widgets() -> dict[str, tuple[Any, dict[str, Any]]]:
    inputs = {name: (entry[0], entry[1]) for name, entry in inputs_of(WanVideoDistributedInference).items()}
    return {name: entry for name, entry in inputs.items() if "default" in entry[1]}


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (2, 5), (80, 81), (81, 81), (84, 85), (121, 121)])
def test_frames_are_raised_to_the_next_possible_number(asked: int, made: int) -> None:
    status = Status()
    assert inference_module._sampling(settings(num_frames=asked), status).num_frames == made
    assert bool(status.warnings) == (asked != made)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"width": 832, "height": 480}, True),
        ({"width": None, "height": 480}, True),
        ({"width": 830, "height": 480}, "width is 830; it must be a multiple of 16. The nearest are 816 and 832"),
        ({"width": 832, "height": 9000}, "height is 9000; it must be 16 to 8192"),
    ],
)
def test_sizes_are_checked_before_a_run(size: dict[str, int], message: bool | str) -> None:
    assert WanVideoDistributedInference.VALIDATE_INPUTS(**size) == message


def test_config_wins_and_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "visible_gpus", lambda: "")
    status = Status()
    (config,) = WanVideoDistributedConfig().build(
        gpu_count=2, use_ulysses=True, use_fsdp=False, offload_model=True, mixed_precision="fp32"
    )
    assert isinstance(config, DistributedConfig)
    parallel = inference_module._parallel(settings(gpu_count=1, config=config), status)
    assert (parallel.gpu_count, parallel.use_fsdp, parallel.offload_model) == (2, False, True)
    assert parallel.mixed_precision == "fp32"
    assert status.warnings == [
        "config is connected: its gpu_count, use_fsdp, offload_model won over this node's own values"
    ]


def text_of(model: ModelFiles, status: Status, **values: Any) -> Any:
    given = settings(**values)
    return inference_module._text(given, model, inference_module._sampling(given, Status()), status)


def test_connected_embeddings_win_over_the_prompt(model: ModelFiles) -> None:
    status = Status()
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    text, tensors = text_of(model, status, text_embeds=both, prompt="a fox")
    assert text is None
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"context": 3, "context_null": 4}
    assert status.warnings == ["text_embeds is connected: prompt of this node had no effect"]


def test_negative_embeds_win_over_the_ones_that_travel_along(model: ModelFiles) -> None:
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    _, tensors = text_of(model, Status(), text_embeds=both, negative_embeds=[[rows(6)[None], {}]])
    assert len(tensors["context_null"]) == 6


def test_no_guidance_needs_no_negative(model: ModelFiles) -> None:
    both = {"prompt_embeds": [rows(3)], "negative_prompt_embeds": [rows(4)]}
    _, tensors = text_of(model, Status(), text_embeds=both, guidance_low=1.0, guidance_high=1.0)
    assert list(tensors) == ["context"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a fox"}, "the model has no text encoder: connect WanVideo TextEncode"),
        ({"prompt": " "}, "prompt is empty and text_embeds is not connected"),
        ({"prompt": "a fox", "negative_embeds": [[rows(3)[None], {}]]}, "connect both or neither"),
    ],
)
def test_text_that_cannot_work_is_explained(model: ModelFiles, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(model, Status(), **values)


def test_deleted_video_makes_the_node_run_once_more(tmp_path: Path) -> None:
    node = WanVideoDistributedInference
    video = tmp_path / "video.mp4"
    video.touch()
    node._videos["test"] = video
    try:
        before = node.IS_CHANGED(unique_id="test")
        assert node.IS_CHANGED(unique_id="test") == before
        video.unlink()
        after = node.IS_CHANGED(unique_id="test")
        assert after != before
        assert node.IS_CHANGED(unique_id="test") == after
    finally:
        node._videos.pop("test", None)
        node._deleted.pop("test", None)


def test_status_tells_what_was_done(tmp_path: Path) -> None:
    info = {
        "video": {"width": 832, "height": 480, "frames": 81, "fps": 16.0},
        "phases": {"load": 10.0, "denoise": 40.0},
        "step_seconds": [2.0, 2.0],
        "peak_gpu_bytes": [2**30, 2**31],
        "peak_rss_bytes": [0, 0],
        "settings": {"precision": "bf16"},
    }
    status = Status()
    status.note("a warning", "a warning")
    text = status.block(tmp_path / "v.mp4", info)
    assert text.splitlines()[0] == "success"
    assert f"video: {tmp_path / 'v.mp4'}" in text
    assert "time: 50.0 s (load 10.0, denoise 40.0)" in text
    assert "step: 2.00 s, mean of 2" in text
    assert "peak GPU memory per process: 1.00 GiB, 2.00 GiB" in text
    assert "host memory" not in text
    assert "  precision: bf16" in text
    assert text.count("a warning") == 1


# The files beside the code


def test_dependencies_are_the_same_in_both_files_and_leave_torch_alone() -> None:
    wanted = [line.replace('"', "'") for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    project = (ROOT / "pyproject.toml").read_text()
    listed = project[project.index("dependencies = [") : project.index("]\nclassifiers")]
    assert [line.strip().strip(",").strip('"') for line in listed.splitlines()[1:] if line.strip()] == wanted
    assert "torch" in wanted


def test_example_workflow_holds_a_value_for_every_widget() -> None:
    workflow = json.loads((ROOT / "example_workflows" / "distributed_inference_workflow.json").read_text())
    for node in workflow["nodes"]:
        kind = NODE_CLASS_MAPPINGS.get(node["type"])
        if kind is WanVideoDistributedInference:
            names = []
            for name, (_, options) in _widgets().items():
                names += [name, "control"] if options.get("control_after_generate") else [name]
            assert len(node["widgets_values"]) == len(names)
            values = dict(zip(names, node["widgets_values"], strict=True))
            assert (values["width"], values["height"], values["num_frames"]) == (832, 480, 81)
            assert values["on_error"] == "raise"
    assert (ROOT / "example_workflows" / "distributed_inference_workflow.jpg").is_file()
