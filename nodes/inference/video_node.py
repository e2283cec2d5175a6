"""What the nodes that make videos have in common: their checks before a run, and how a run may end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from ...distributed.job.errors import JobCancelled
from ...distributed.job.job import JobError
from ...distributed.launch.launcher import JobFailed
from ...distributed.machine.cancelling import cancelled_by
from ..host import host
from ..host.declared import taken, value_of
from ..host.exceptions import told_to_comfyui
from ..host.node_report import NodeReport
from ..models import catalogue
from ..sockets.wrapper_model import AUTO
from .inference_inputs import SOCKETS, required


class MadeVideos:
    """Which videos each node made last, to notice that one was deleted."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Path, ...]] = {}
        self._deleted: dict[str, int] = {}

    def remember(self, node_id: str | None, videos: Iterable[Path]) -> None:
        self._made[str(node_id)] = tuple(videos)

    def deletions(self, node_id: str | None) -> int:
        """How often one of the node's last videos was found deleted."""
        key = str(node_id)
        if not all(video.is_file() for video in self._made.get(key, ())):
            del self._made[key]
            self._deleted[key] = self._deleted.get(key, 0) + 1
        return self._deleted.get(key, 0)


class VideoNode(ABC):
    """A node that runs jobs."""

    CATEGORY = "WanVideoDistributed"
    FUNCTION = "run"
    OUTPUT_NODE = True

    # ComfyUI asks a class, not an instance, whether a node must run again, hence kept on the class.
    made: ClassVar[MadeVideos] = MadeVideos()

    def check_lazy_status(self, *, width: Any, height: Any, **inputs: Any) -> list[str]:
        """What ComfyUI shall have made before the run: nothing for a size that the run refuses.

        Not VALIDATE_INPUTS: ComfyUI marks every input that such a check takes, not the one that is wrong, and no longer
        looks at its range.
        """
        try:
            _check_sizes(width, height)
        except ValueError:
            return []
        return [name for name in SOCKETS if name in inputs and inputs[name] is None]

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, vae: str | None = AUTO, **_: Any) -> str:
        """Changes when a video of the node's last run was deleted, whose path a cached run would hand out, or when
        `vae` was replaced; the files of links are looked at by the nodes that they come from."""
        files = () if vae in (None, AUTO) else catalogue.vae_files(vae)
        return f"{cls.made.deletions(unique_id)} {catalogue.fingerprint(files)}"

    def run(self, /, **inputs: Any) -> dict[str, Any]:
        report = NodeReport(inputs.get("unique_id"), inputs.get("extra_pnginfo"))
        report.text("checking the inputs")
        try:
            return self._reported(report, inputs)
        except BaseException as error:
            report.end("cancelled" if host.is_interruption(error) else "failed")
            raise

    def _reported(self, report: NodeReport, inputs: dict[str, Any]) -> dict[str, Any]:
        with told_to_comfyui():
            try:
                with cancelled_by(host.interrupted):
                    given = taken(type(self), inputs)
                    # First: without what check_lazy_status leaves out, the others would find other faults.
                    _check_sizes(given["width"], given["height"])
                    return self._run(report, **given)
            except JobCancelled:
                raise
            except (ValueError, JobError) as error:
                if inputs.get("on_error", "raise") != "return":
                    raise
                report.end("failed")
                log = error.log if isinstance(error, JobFailed) else ""
                return {"result": self._failed(log, f"error: {error}")}

    @abstractmethod
    def _run(self, report: NodeReport, *_: Any, **inputs: Any) -> dict[str, Any]:
        """What ComfyUI is given of a run that went well."""

    @abstractmethod
    def _failed(self, log: str, status: str) -> tuple[Any, ...]:
        """The outputs of a run that failed, for on_error=return."""


def _check_sizes(width: Any, height: Any) -> None:
    """Raises ValueError naming the side that no model can have."""
    from ...distributed.planning.preflight import check_size

    for name, value in (("width", width), ("height", height)):
        check_size(name, value_of(name, required()[name], value))
