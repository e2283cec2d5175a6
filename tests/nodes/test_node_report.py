"""What a node that runs sends to the page."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from wan_pack.distributed.job.progress import Progress
from wan_pack.nodes.host import host
from wan_pack.nodes.host.node_report import BAR_STEPS, NodeReport


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Contents of the events, and the values of the bar."""
    found: list[Any] = []
    monkeypatch.setattr(host, "send", lambda event, content: found.append(content))
    bar = SimpleNamespace(update_absolute=found.append)
    monkeypatch.setattr(host, "progress_bar", lambda total, node_id: bar)
    monkeypatch.setattr(host, "preview_size", lambda: 16)
    monkeypatch.setattr(host, "interrupted", lambda: False)
    return found


def test_text_picture_and_end_name_the_node_and_its_workflow(sent: list[Any]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 16)).save(file, format="JPEG")
    report = NodeReport("12:5", {"workflow": {"id": "w"}})
    report(Progress(phase="denoise", step=1, total=2, usage="2 processes", preview=file.getvalue()))
    report.end("cancelled")
    report.end("done", [{"filename": "a.mp4"}])
    bar, text, picture, cancelled, done = sent
    assert 0 < bar < BAR_STEPS
    mine = {"node": "12:5", "workflow": "w"}
    assert text == {**mine, "text": "sampling 1/2\n2 processes"}
    assert Image.open(io.BytesIO(base64.b64decode(picture.pop("picture")))).size == (16, 8)
    assert picture == mine
    assert cancelled == {**mine, "text": "cancelled", "ended": True}, "the videos of before are shown again"
    assert done == {**mine, "text": "done", "ended": True, "videos": [{"filename": "a.mp4"}]}


def test_a_cancel_is_the_jobs_to_see(sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come while progress is on its way: what the bar raises then would end processes that are to stay."""
    report = NodeReport("1")
    monkeypatch.setattr(host, "interrupted", lambda: True)
    report(Progress(phase="denoise", step=1, total=2, preview=b"a picture"))
    assert sent == []


def test_the_bar_does_not_run_backwards(sent: list[Any]) -> None:
    report = NodeReport("1")
    report.show(0.5, "")
    report.show(0.25, "")
    assert [value for value in sent if isinstance(value, int)] == [BAR_STEPS // 2] * 2


@pytest.mark.parametrize("extra_pnginfo", [None, {}, {"workflow": None}, {"workflow": {}}, {"workflow": []}, 3])
def test_a_job_over_the_api_carries_no_workflow(sent: list[Any], extra_pnginfo: Any) -> None:
    NodeReport("1", extra_pnginfo).text("sampling")
    assert sent == [{"node": "1", "workflow": None, "text": "sampling"}]


def test_without_a_node_nothing_is_sent(sent: list[Any]) -> None:
    NodeReport(None).text("sampling")
    assert sent == []
