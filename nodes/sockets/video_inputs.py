"""What one video is asked for: the inputs of the nodes that make videos, by type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...distributed.job.job import Parallel
from ...distributed.job.sampling import SamplingSettings
from ...distributed.job.setting import choice, default_of, number
from ..host.declared import kind_of
from ..host.status import Status
from ..settings.presets import CUSTOM, PRESETS
from ..settings.spread import DistributedConfig
from ..settings.widgets import INPUT_NAMES
from .control_embeds import has_control
from .wrapper_model import AUTO

LAYOUT = ("gpu_count", "use_ulysses", "use_fsdp", "offload_model", "plan")
"""Inputs that a connected config has too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInputs:
    """What sockets bring is as it came; who reads it checks it."""

    model: Any
    """ModelFiles, or a WANVIDEOMODEL."""
    sampling: SamplingSettings
    config: DistributedConfig
    """The connected one, or the node's own values."""
    overruled: tuple[str, ...] = ()
    """Those of the node's own values that a connected config has otherwise."""
    prompt: str = ""
    text_embeds: Any = None
    negative_embeds: Any = None
    negative_prompt: str = ""
    start_image: Any = None
    end_image: Any = None
    image_embeds: Any = None
    samples: Any = None
    decode_video: bool = True
    preset: str = choice(CUSTOM, [CUSTOM, *PRESETS])
    low_noise_model: Any = None
    vae: str = AUTO
    preview: bool = True
    dynamic_resolution: bool = False
    clip_vision_start_image: Any = None
    clip_vision_end_image: Any = None
    control_video: Any = None
    control_mask: Any = None
    reference_images: Any = None
    vace_strength: float = number(1.0, 0.0, 1000.0, step=0.01)
    camera_conditions: Any = None
    frames: bool = False
    """Somebody takes the frames; no input, as the next two."""
    side_by_side: int = 1
    """Jobs that share this machine's memory."""
    more_follow: bool = False
    """As `Parallel` has it."""

    @property
    def followed(self) -> bool:
        """Whether there is a control that the video follows, from whichever socket."""
        return self.control_video is not None or has_control(self.image_embeds)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VideoInputs:
        """A node's inputs by name; what is not given has its default. Raises ValueError if `config` is something else.

        Args:
            given: checked by `host.declared.taken`.
        """
        own = {name: given[name] for name in LAYOUT if name in given}
        config: Any = given.get("config")
        overruled: tuple[str, ...] = ()
        if config is None:
            config = DistributedConfig(**own)
        elif not isinstance(config, DistributedConfig):
            raise ValueError(f"config is {kind_of(config)}; connect Wan Video Distributed Config to it")
        else:
            overruled = tuple(name for name, value in own.items() if value != getattr(config, name))
        sampling = {
            field.name: given.get(INPUT_NAMES.get(field.name, field.name), default_of(SamplingSettings, field.name))
            for field in dataclasses.fields(SamplingSettings)
        }
        fields = {field.name for field in dataclasses.fields(cls)}
        rest = {name: value for name, value in given.items() if name in fields}
        made = {"sampling": SamplingSettings(**sampling), "config": config, "overruled": overruled}
        return cls(**{**rest, **made})

    def parallel(self, **layout: Any) -> Parallel:
        """The switches as they are."""
        return self.config.parallel(more_follow=self.more_follow, **layout)

    def say_overruled(self, status: Status) -> None:
        if self.overruled:
            names = ", ".join(self.overruled)
            status.note(f"config is connected: its {names} won over this node's own values")
