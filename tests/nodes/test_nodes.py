"""The nodes without ComfyUI: what they declare, and the files beside the code."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mount import ROOT
from node_inputs import inputs_of, use_model_folders, widgets
from patience import COMES_UP
from wan_pack.nodes import DISPLAY_NAMES, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, node_classes
from wan_pack.nodes.batch.batch import WanVideoDistributedBatch
from wan_pack.nodes.inference.inference import WanVideoDistributedInference

TEXT_NODES = {"LoadWanVideoT5TextEncoder", "WanVideoTextEncode"}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders, in `tmp_path`."""
    use_model_folders(tmp_path, monkeypatch)
    return tmp_path


def help_page(node: Any) -> str:
    return (ROOT / "web" / "docs" / f"{node.__name__}.md").read_text()


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_node_declares_everything_a_user_reads(node: Any) -> None:
    assert node.DESCRIPTION.endswith(".")
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert all(node.OUTPUT_TOOLTIPS)
    for name, (_, options) in inputs_of(node).items():
        assert options.get("tooltip"), f"{node.__name__}.{name} has no tooltip"
    page = help_page(node)
    if node is WanVideoDistributedBatch:
        # It says that the rest is there.
        page += help_page(WanVideoDistributedInference)
    for name in inputs_of(node):
        assert re.search(rf"\b{name}\b", page), f"{node.__name__}.{name} is not in its help page"
    assert NODE_DISPLAY_NAME_MAPPINGS[node.__name__] == DISPLAY_NAMES[node.__name__]


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_node_function_takes_its_inputs(node: Any) -> None:
    names = [*inputs_of(node), *node.INPUT_TYPES().get("hidden", {})]
    inspect.signature(getattr(node, node.FUNCTION)).bind(None, **dict.fromkeys(names))


@pytest.mark.parametrize("node", NODE_CLASS_MAPPINGS.values(), ids=lambda node: node.__name__)
def test_lists_are_lists_that_the_server_checks(node: Any) -> None:
    for name, (kind, options) in inputs_of(node).items():
        assert kind != "COMBO", f"{name}: the server does not check a COMBO"
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name


def test_text_nodes_come_as_a_pair_or_not_at_all() -> None:
    assert set(node_classes(frozenset())) >= TEXT_NODES
    for taken in TEXT_NODES:
        assert not TEXT_NODES & set(node_classes(frozenset({taken})))
        assert "WanVideoDistributedInference" in node_classes(frozenset({taken}))


def test_text_nodes_have_the_sockets_of_the_pack_they_replace() -> None:
    loader, encode = (NODE_CLASS_MAPPINGS[name] for name in ("LoadWanVideoT5TextEncoder", "WanVideoTextEncode"))
    assert list(loader.INPUT_TYPES()["required"]) == ["model_name", "precision"]
    assert loader.INPUT_TYPES()["required"]["precision"][0] == ["fp32", "bf16"]
    assert (loader.RETURN_TYPES, loader.RETURN_NAMES) == (("WANTEXTENCODER",), ("wan_t5_model",))
    assert list(encode.INPUT_TYPES()["required"]) == ["positive_prompt", "negative_prompt"]
    assert encode.INPUT_TYPES()["optional"]["t5"][0] == "WANTEXTENCODER"
    assert (encode.RETURN_TYPES, encode.RETURN_NAMES) == (("WANVIDEOTEXTEMBEDS",), ("text_embeds",))


def test_inputs_keep_their_order() -> None:
    # Saved workflows hold values by position: a new input may only come at the end.
    assert list(inputs_of(WanVideoDistributedInference)) == [
        *("model", "prompt", "width", "height", "num_frames", "sample_steps"),
        *("gpu_count", "use_ulysses", "use_fsdp", "offload_model"),
        *("text_embeds", "config", "negative_embeds", "negative_prompt", "seed", "scheduler", "shift"),
        *("guidance_low", "guidance_high", "boundary", "fps", "filename_prefix", "on_error"),
        *("start_image", "end_image", "image_embeds", "samples", "strength", "start_step", "end_step", "add_noise"),
        *("decode_video", "preset", "low_noise_model", "vae", "preview", "plan", "dynamic_resolution"),
        "reuse_threshold",
        *("clip_vision_start_image", "clip_vision_end_image", "control_video", "control_mask", "reference_images"),
        *("vace_strength", "crf", "video_format", "camera_conditions"),
    ]
    names = ("video_path", "log_output", "status", "video", "samples", "images")
    assert names == WanVideoDistributedInference.RETURN_NAMES
    loader = ["high_noise", "low_noise", "vae", "text_encoder", "high_noise_lora", "low_noise_lora", "clip_vision"]
    assert list(inputs_of(NODE_CLASS_MAPPINGS["LoadWanVideoModel"])) == loader


@pytest.mark.processes
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
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=COMES_UP, check=True
    )
    assert json.loads(done.stdout) == []
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


# The files beside the code


def test_example_workflow_holds_a_value_for_every_widget() -> None:
    workflow = json.loads((ROOT / "example_workflows" / "distributed_inference_workflow.json").read_text())
    for node in workflow["nodes"]:
        kind = NODE_CLASS_MAPPINGS.get(node["type"])
        if kind is WanVideoDistributedInference:
            names = []
            for name, (_, options) in widgets().items():
                names += [name, "control"] if options.get("control_after_generate") else [name]
            assert len(node["widgets_values"]) == len(names)
            values = dict(zip(names, node["widgets_values"], strict=True))
            assert (values["width"], values["height"], values["num_frames"]) == (832, 480, 81)
            assert values["on_error"] == "raise"
            defaults = {name: options["default"] for name, (_, options) in widgets().items()}
            later = ("strength", "start_step", "end_step", "add_noise", "decode_video", "preset", "vae", "preview")
            assert {name: values[name] for name in later} == {name: defaults[name] for name in later}
    assert (ROOT / "example_workflows" / "distributed_inference_workflow.jpg").is_file()


def widgets_of(kind: Any) -> list[str]:
    """What a workflow holds the values of, in order."""
    names = []
    for name, (type_, options) in inputs_of(kind).items():
        if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            names += [name, "control"] if options.get("control_after_generate") else [name]
    return names


def test_every_example_has_every_socket_and_a_value_for_every_widget_of_our_nodes() -> None:
    """One that a new input was not added to is shown without it, or with shifted values."""
    wrong = []
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        api = json.loads((path.parent / "api" / path.name).read_text())
        for node in json.loads(path.read_text())["nodes"]:
            kind = NODE_CLASS_MAPPINGS.get(node["type"])
            names = [] if kind is None else widgets_of(kind)
            if kind is not None and len(node["widgets_values"]) != len(names):
                wrong.append((path.name, node["type"], len(node["widgets_values"]), len(names)))
            if kind is not None:
                sockets = [name for name in inputs_of(kind) if name not in names]
                held = [one["name"] for one in node["inputs"] if "widget" not in one]
                wrong += [(path.name, node["type"], held, sockets)] if held != sockets else []
            sent = api.get(str(node["id"]), {"inputs": {}})["inputs"]
            missing = [name for name in names if name != "control" and sent and name not in sent]
            wrong += [(path.name, node["type"], "api", missing)] if missing else []
    assert wrong == []


EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_save_once_run_from_left_to_right_and_have_titles(path: Path) -> None:
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    kinds = [node["type"] for node in nodes.values()]
    # These save what they make.
    made = {WanVideoDistributedInference.__name__, WanVideoDistributedBatch.__name__}
    assert sum(kind in {*made, "SaveVideo"} for kind in kinds) == 1
    for _, start, _, end, *_ in workflow["links"]:
        assert nodes[start]["pos"][0] + nodes[start]["size"][0] < nodes[end]["pos"][0], (nodes[start], nodes[end])
    sent = json.loads((path.parent / "api" / path.name).read_text())
    ours = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    for node in ours:
        assert DISPLAY_NAMES[node["type"]] not in node["title"]
        assert sent[str(node["id"])]["_meta"]["title"] == node["title"]
    assert len({node["title"] for node in ours}) == len(ours)


def test_examples_say_where_every_file_that_they_name_comes_from() -> None:
    """The page offers to download what is missing, into the folder where it belongs."""
    seen = set()
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        for node in json.loads(path.read_text())["nodes"]:
            files = [v for v in node.get("widgets_values") or [] if isinstance(v, str) and v.endswith(".safetensors")]
            models = node["properties"].get("models", [])
            assert [model["name"] for model in models] == files, (path.name, node["type"])
            for model in models:
                assert set(model) == {"name", "url", "directory"}
                repository = (
                    r"https://huggingface\.co/Comfy-Org/Wan_2\.[12]_ComfyUI_[Rr]epackaged/resolve/main/split_files"
                )
                assert re.fullmatch(f"{repository}/{model['directory']}/{re.escape(model['name'])}", model["url"])
                seen.add(model["directory"])
    assert seen == {"clip_vision", "diffusion_models", "loras", "text_encoders", "vae"}
