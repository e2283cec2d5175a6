"""What CLIP sees in the pictures, in every form that other nodes hand on -> the features that a job takes.

CLIP_VISION_OUTPUT of CLIP Vision Encode, by itself or in CONDITIONING (clip_vision_output), holds
penultimate_hidden_states [1, 257, 1280]; WanFirstLastFrameToVideo joins those of two pictures to [1, 514, 1280].
WANVIDIMAGE_EMBEDS of ComfyUI-WanVideoWrapper holds the same as clip_context. Without any of them the job's own CLIP
looks at the pictures that the video starts and ends with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...distributed.job.job import ModelFiles
from ...wan.model.config import PICTURE_ROWS
from ...wan.model.variants import takers
from ..host.declared import kind_of
from ..host.entry_keys import HIDDEN_STATES, SEEN
from ..host.status import Status
from ..host.tensors import tensor_of
from .embeds import extras_of
from .video_inputs import VideoInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...wan.model.config import WanConfig

OWN = ("clip_vision_start_image", "clip_vision_end_image")
"""The node's inputs."""
FORM = "features [1, n, C] of CLIP Vision Encode"


def shown(asked: VideoInputs, model: ModelFiles, config: WanConfig) -> dict[str, Any]:
    """The pictures for the job's own CLIP, as many as the model has places for: name of the input -> IMAGE."""
    if not config.image_branch or not model.clip_vision:
        return {}
    # Of Fun-Control the reference before the first frame, as in the code of its makers.
    names = ("start_image", "end_image") if config.pictures > 1 else ("reference_images", "start_image", "end_image")
    given = {name: getattr(asked, name) for name in names if name in config.variant.takes}
    return dict([(name, value) for name, value in given.items() if value is not None][: config.pictures])


def picture_tensors(shown: dict[str, Any], status: Status) -> dict[str, Tensor]:
    """`clip_pictures` [n, 3, 224, 224], where some are shown."""
    import torch

    from ...wan.vision.clip_picture import fit_clip_picture

    if not shown:
        return {}
    status.note(f"CLIP looks at {' and '.join(shown)}, inside the job")
    pictures = [tensor_of(value, name, "an IMAGE [1, H, W, 3]")[0, :, :, :3] for name, value in shown.items()]
    return {"clip_pictures": torch.stack([fit_clip_picture(picture) for picture in pictures])}


def clip_tensors(asked: VideoInputs, config: WanConfig, status: Status) -> dict[str, Tensor]:
    """`clip_features` [n, C], as far as the inputs hold them.

    Raises:
        ValueError: in the user's words, if they cannot be used or come twice.
    """
    import torch

    found: dict[str, Tensor] = {}
    names = [name for name in OWN if getattr(asked, name) is not None]
    own = [_of_output(getattr(asked, name), name) for name in names]
    if own:
        found[" and ".join(names)] = torch.cat(own)
    positive, negative = (extras_of(getattr(asked, name), name) for name in ("text_embeds", "negative_embeds"))
    output = positive.get(SEEN)
    if output is not None:
        found["text_embeds"] = _of_output(output, f"{SEEN} of text_embeds")
    if (other := negative.get(SEEN)) is not None and other is not output:
        same = output is not None and torch.equal(_of_output(other, f"{SEEN} of negative_embeds"), found["text_embeds"])
        if not same:
            raise ValueError(
                "negative_embeds carries other CLIP vision features than text_embeds; connect both outputs of the node "
                "that adds them"
            )
    if isinstance(asked.image_embeds, dict) and asked.image_embeds.get("clip_context") is not None:
        found["image_embeds"] = _of_embeds(asked.image_embeds)
    if not found:
        return _of_no_picture(asked, config, status)
    if "clip_features" not in config.variant.takes:
        if own:
            raise ValueError(
                f"{names[0]} is connected; this model ({config.variant.name}) has no image branch, as "
                f"{takers('clip_features')} has: disconnect it"
            )
        status.note(f"{' and '.join(found)} carry CLIP vision features, which {config.variant.name} models do not use")
        return {}
    if len(found) > 1:
        raise ValueError(f"CLIP vision features come twice: with {' and with '.join(found)}; take one of them out")
    return {"clip_features": next(iter(found.values())).float().contiguous()}


def _of_no_picture(asked: VideoInputs, config: WanConfig, status: Status) -> dict[str, Tensor]:
    """Zeros for a model that follows a control video and is shown nothing else, as in the code of its makers."""
    import torch

    pictures = (asked.start_image, asked.end_image, asked.reference_images)
    if not config.image_branch or not asked.followed or any(picture is not None for picture in pictures):
        return {}
    status.note("there is no picture for CLIP beside the control video: its features are zeros")
    return {"clip_features": torch.zeros(PICTURE_ROWS, config.clip_dim)}


def _of_output(value: Any, name: str) -> Tensor:
    """[n, C] of a CLIP_VISION_OUTPUT."""
    states = getattr(value, HIDDEN_STATES, None)
    if states is None:
        raise ValueError(f"{name} is {kind_of(value)}; it must be a CLIP_VISION_OUTPUT, as CLIP Vision Encode makes it")
    return _rows(states, name)


def _of_embeds(value: dict[str, Any]) -> Tensor:
    import torch

    features = _rows(value["clip_context"], "clip_context of image_embeds")
    other = value.get("negative_clip_context")
    if other is not None and not torch.equal(_rows(other, "negative_clip_context of image_embeds"), features):
        raise ValueError(
            "image_embeds carries other CLIP vision features for the negative prompt, which this node does not support"
        )
    return features


def _rows(value: Any, name: str) -> Tensor:
    states = tensor_of(value, name, FORM)
    if states.ndim == 3 and states.shape[0] == 1:
        states = states[0]
    if states.ndim != 2 or 0 in states.shape:
        raise ValueError(f"{name} has the shape {list(states.shape)}; it must be {FORM}")
    return states
