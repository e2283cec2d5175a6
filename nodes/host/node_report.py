"""What a node that runs shows in the page: its bar, a line of text, pictures, its videos."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from ...distributed.job.progress import Progress
from . import host
from .contact_sheet import contact_sheet

EVENT = "wan_distributed.node"
"""Of `web/js/video_widget.js`. ComfyUI's own texts and previews are shown otherwise in each version of the page."""
BAR_STEPS = 1000
"""Resolution of the progress bar over a whole job."""


class NodeReport:
    """Of one run of a node.

    Must be used on ComfyUI's own node thread: the bar raises InterruptProcessingException there after a cancel.

    Args:
        node_id: None where there is no node; then nothing is shown.
        extra_pnginfo: as ComfyUI hands it to nodes; the workflow in it tells which of the open ones the node is in.
    """

    def __init__(self, node_id: str | None, extra_pnginfo: Any = None) -> None:
        self._node_id = node_id
        workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
        self._workflow = workflow.get("id") if isinstance(workflow, dict) else None
        self._bar: Any = None
        self._shown = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the node started."""
        return time.monotonic() - self._started

    def __call__(self, progress: Progress) -> None:
        """Of a job. After a cancel nothing more: the bar would raise, which ends the job as an error does, with
        processes that a cancel leaves to the next one."""
        if host.interrupted():
            return
        text = f"{progress.text}\n{progress.usage}" if progress.usage else progress.text
        self.show(progress.fraction, text)
        if progress.preview is not None:
            self.pictures([progress.preview])

    def show(self, fraction: float, text: str) -> None:
        if self._bar is None:
            self._bar = host.progress_bar(BAR_STEPS, self._node_id)
        # A bar that runs backwards (a phase that reports late) confuses more than one that waits.
        self._shown = max(self._shown, int(fraction * BAR_STEPS))
        self._bar.update_absolute(self._shown)
        self.text(text)

    def pictures(self, jpegs: Sequence[bytes]) -> None:
        """Shows them on the node, together at most of the size that ComfyUI's --preview-size asks for."""
        self._send(picture=base64.b64encode(contact_sheet(jpegs, host.preview_size())).decode())

    def text(self, line: str) -> None:
        self._send(text=line)

    def end(self, text: str, videos: Sequence[dict[str, str]] = ()) -> None:
        """The last text.

        Args:
            videos: that were made, as the node's outputs name them; without any the page shows those that it showed.
        """
        self._send(text=text, ended=True, **({"videos": list(videos)} if videos else {}))

    def _send(self, **content: Any) -> None:
        if self._node_id is not None:
            host.send(EVENT, {"node": self._node_id, "workflow": self._workflow, **content})
