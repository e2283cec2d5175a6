"""How a video is made: planned for the GPUs that there are, or as the switches say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...distributed.job.job import ModelFiles, Parallel, Sampling
from ...wan.model.variants import FRAMES, Variant
from ..host.status import Status
from ..sockets.fun_inputs import has_reference
from ..sockets.vace_inputs import control_size
from ..sockets.video_inputs import VideoInputs
from .ground import ground_for, shown

if TYPE_CHECKING:
    from torch import Tensor

    from ...distributed.planning.policies import Request
    from ...wan.model.config import WanConfig


def planned(
    asked: VideoInputs,
    literal: Callable[[], Parallel],
    model: ModelFiles,
    sampling: Sampling,
    *,
    config: WanConfig,
    control: dict[str, Tensor],
    encodes_text: bool,
    status: Status,
) -> tuple[Parallel, Sampling]:
    """The layout of the job and, where dynamic_resolution lowers it, its size. The status gets the plan.

    Args:
        literal: the switches as they are.
        config: of the model.
        control: what a VACE model follows, where other nodes have encoded it.
        encodes_text: the job runs the text encoder.
    Raises:
        ValueError: the video does not fit; the message says what would.
    """
    from ...distributed.planning.plan import DoesNotFit, as_set
    from ...distributed.planning.workload import workload_of

    dynamic = asked.dynamic_resolution
    ground = ground_for(asked.config, side_by_side=asked.side_by_side)
    if isinstance(ground, str):
        if dynamic:
            status.warn(f"dynamic_resolution had no effect: {ground}")
        return shown(as_set(literal(), ground), status), sampling
    request = _request(asked, model, sampling)
    image = asked.start_image is not None
    given = (asked.samples, asked.image_embeds, asked.camera_conditions)
    sized = bool(control) or any(one is not None for one in given)
    controls, references = control_size(asked, control, sampling, config)
    work = workload_of(
        model,
        sampling,
        request.base,
        encodes_text=encodes_text,
        looks=bool(model.clip_vision),
        given_frames=config.variant.known_frames and image,
        decode=asked.decode_video,
        encode_frames=_encoded_frames(asked, config.variant, sampling.num_frames, carried=bool(control)),
        controls=controls,
        references=references + has_reference(asked, config),
    )
    try:
        made = ground.plan(work, request)
    except DoesNotFit as error:
        # Latents that are given have a size of their own.
        if not dynamic or error.size is None or sized:
            raise
        width, height = error.size
        made = ground.plan(dataclasses.replace(work, width=width, height=height), request)
        status.warn(
            f"dynamic_resolution lowered the video from {sampling.width}x{sampling.height} to {width}x{height}, the "
            "largest that fits"
        )
        sampling = dataclasses.replace(sampling, width=width, height=height)
    return shown(made, status), sampling


def _encoded_frames(asked: VideoInputs, variant: Variant, num_frames: int, *, carried: bool) -> int:
    """Frames that the VAE encodes at once, of what the video starts from or follows; 0: none.

    Args:
        carried: other nodes have encoded what a VACE model follows.
    """
    if variant.controlled:
        # Grey ones, where nothing is given.
        return 0 if carried else num_frames
    pictures = [picture for picture in (asked.start_image, asked.end_image) if picture is not None]
    if asked.control_video is not None or (pictures and FRAMES in variant.image):
        return num_frames
    return int(bool(pictures) or asked.reference_images is not None)


def _request(asked: VideoInputs, model: ModelFiles, sampling: Sampling) -> Request:
    from ...distributed.planning.policies import Request
    from ...distributed.planning.preflight import always_guided

    return Request(
        base=asked.parallel(),
        gpu_count=asked.config.gpu_count,
        cfg_parallel=asked.config.cfg_parallel,
        always_guided=always_guided(model, sampling),
    )
