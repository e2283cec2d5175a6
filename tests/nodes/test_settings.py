"""A setting is declared once: what the job checks and what the nodes show are the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from mount import ROOT
from node_inputs import inputs_of, use_model_folders
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.job.sampling import Sampling, SamplingSettings
from wan_pack.distributed.job.setting import Choice, Number, Numbers, check_settings, choice, number, setting_of
from wan_pack.distributed.job.switches import Switches
from wan_pack.nodes.inference.inference import WanVideoDistributedInference
from wan_pack.nodes.settings.spread import DistributedConfig, WanVideoDistributedConfig
from wan_pack.nodes.settings.widgets import INPUT_NAMES, widget
from wan_pack.nodes.sockets.video_inputs import LAYOUT, VideoInputs


def places(name: str) -> list[str]:
    """Lines of product code that speak of it."""
    return [
        f"{path.relative_to(ROOT).as_posix()}: {line.strip()}"
        for part in ("distributed", "nodes", "wan")
        for path in sorted((ROOT / part).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(rf"\b{name}\b", line)
    ]


def test_a_setting_takes_three_places():
    """Its field, its tooltip, the file where it is used; everything between is derived."""
    found = list(dict.fromkeys(place.partition(":")[0] for place in places("sparse_tau")))
    assert found == ["distributed/job/switches.py", "distributed/rank/session.py", "nodes/settings/spread.py"]


def test_a_new_field_is_checked_and_shown():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Newer(Switches):
        share: float = number(0.5, 0.25, 0.75, step=0.25)
        seconds: float = number(9.0, 1, 10, unit="seconds")
        port: int = number(0, 10, 20, off="none")
        ratio: float = number(1.0, 0.0, 2.0, step=0.5, open=True)
        way: str = choice("near", ("near", "far"))
        on: bool = False

    check_settings(Newer())
    assert widget(Newer, "share", "tip") == (
        "FLOAT", {"default": 0.5, "min": 0.25, "max": 0.75, "step": 0.25, "tooltip": "tip"}
    )  # fmt: skip
    assert widget(Newer, "seconds", "tip") == ("INT", {"default": 9, "min": 1, "max": 10, "tooltip": "tip"})
    assert widget(Newer, "port", "tip")[1]["min"] == 0
    assert widget(Newer, "ratio", "tip")[1]["min"] == 0.5
    assert widget(Newer, "way", "tip") == (["near", "far"], {"default": "near", "tooltip": "tip"})
    assert widget(Newer, "on", "tip", more=1) == ("BOOLEAN", {"default": False, "more": 1, "tooltip": "tip"})
    for values, words in (
        ({"share": 0.8}, r"^share is 0\.8; it must be 0\.25 to 0\.75$"),
        ({"seconds": float("nan")}, "^seconds is nan; it must be 1 to 10 seconds$"),
        ({"port": 9}, r"^port is 9; it must be 0 \(none\) or 10 to 20$"),
        ({"ratio": 0.0}, r"^ratio is 0\.0; it must be over 0, at most 2$"),
        ({"way": "off"}, "^way is 'off'; it must be one of near, far$"),
    ):
        with pytest.raises(ValueError, match=words):
            check_settings(Newer(**values))
        check_settings(Newer(**values), but=tuple(values))


PARALLEL = Parallel(gpu_count=1)
SAMPLING = Sampling(width=832, height=480, num_frames=81, steps=1000, seed=1)


@pytest.mark.parametrize("field", dataclasses.fields(Switches), ids=lambda field: field.name)
def test_the_config_node_offers_what_the_job_takes(field: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_model_folders(tmp_path, monkeypatch)
    kind, options = inputs_of(WanVideoDistributedConfig)[field.name]
    setting = setting_of(Switches, field.name)
    ends = kind if isinstance(setting, Choice) else [False, True]
    if isinstance(setting, Number):
        ends = [options["min"], options["max"]]
    elif isinstance(setting, Numbers):
        ends = ["0", f"{setting.below - 1}, 3-5"]
    for value in [options["default"], *ends]:
        config = DistributedConfig(gpu_count=1, **{"use_fsdp": False, field.name: value})
        assert getattr(config.parallel(), field.name) == value
    if isinstance(setting, Number):
        for value in (options["min"] - 1, options["max"] + 1):
            with pytest.raises(ValueError, match=f"{field.name} is "):
                dataclasses.replace(PARALLEL, **{field.name: value})
    if isinstance(setting, Numbers):
        with pytest.raises(ValueError, match=f"{field.name} is '{setting.below}'"):
            dataclasses.replace(PARALLEL, **{field.name: str(setting.below)})


@pytest.mark.parametrize("field", dataclasses.fields(SamplingSettings), ids=lambda field: field.name)
def test_the_inference_node_offers_what_the_job_takes(field: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_model_folders(tmp_path, monkeypatch)
    kind, options = inputs_of(WanVideoDistributedInference)[INPUT_NAMES.get(field.name, field.name)]
    setting = setting_of(SamplingSettings, field.name)
    if isinstance(setting, Choice):
        assert kind == list(setting.names)
    elif isinstance(setting, Number):
        for value in (options["min"], options["max"]):
            rest = {"steps": 1001} if field.name in ("start_step", "end_step") else {}
            made = SamplingSettings(**{**dataclasses.asdict(SAMPLING), **rest, field.name: value})
            check_settings(made, but=tuple(rest))
        for value in (options["min"] - 1, options["max"] + 1):
            with pytest.raises(ValueError, match=f"{field.name} is "):
                dataclasses.replace(SAMPLING, **{field.name: value})


def test_no_input_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """VideoInputs has a place for every input, but those that are about the file and the end of the run."""
    use_model_folders(tmp_path, monkeypatch)
    known = {*LAYOUT, *(field.name for field in dataclasses.fields(VideoInputs))}
    known |= {INPUT_NAMES.get(field.name, field.name) for field in dataclasses.fields(SamplingSettings)}
    assert set(inputs_of(WanVideoDistributedInference)) - known == {"filename_prefix", "on_error"}
    config = {field.name for field in dataclasses.fields(DistributedConfig)}
    assert set(inputs_of(WanVideoDistributedConfig)) == config


def test_what_the_config_node_offers_beyond_the_jobs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its own choices, word for word: saved workflows hold them."""
    use_model_folders(tmp_path, monkeypatch)
    offered = inputs_of(WanVideoDistributedConfig)
    assert list(offered["cfg_parallel"][0]) == ["auto", "on", "off"]
    assert list(offered["plan"][0]) == ["auto", "as set"]
