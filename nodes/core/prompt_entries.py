"""What a sampling's prompts hold, against what its model takes: said before anything is planned or started."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...distributed.job.control_inputs import MAX_CONTROL_STRENGTH
from ...distributed.job.errors import counted, listed
from ...distributed.job.evaluator import MAX_CONTROL_BYTES
from ...distributed.job.input_tensors import MAX_PICTURES
from ...distributed.job.job import FLOAT_BYTES
from ...wan.model.config import PICTURE_ROWS
from ...wan.model.latent_space import LATENT_SPACES, WAN21
from ...wan.sampling.told import KINDS, Kind
from ..host.core_model import CoreSampling
from ..host.declared import kind_of, number
from ..host.entry_keys import (
    HIDDEN_STATES,
    PICTURE,
    PICTURE_MASK,
    REFERENCES,
    SEEN,
    TEXT,
    VACE_FRAMES,
    VACE_MASKS,
    VACE_STRENGTHS,
)  # fmt: skip
from ..host.tensors import tensor_of

if TYPE_CHECKING:
    from ...wan.model.config import WanConfig

GIB = 1 << 30


def check_conditioning(sampling: CoreSampling, config: WanConfig) -> None:
    """Raises ValueError, in the user's words, for what the model or ComfyUI's own code of it would stumble over.

    What a model has no part for is passed over, as there. What has another size than the latents is refused with the
    first evaluation, which may be of an area.
    """
    for _, entry in _entries(sampling):
        if entry.get(TEXT) is None:
            raise ValueError("a conditioning has no text; connect CLIP Text Encode with a CLIP of type wan")
        if config.image_branch and entry.get(SEEN) is None:
            raise ValueError(KINDS["picture"].needed)
    for name, entry in _entries(sampling):
        told = _Told(config, entry, f"of the {name} conditioning", sampling)
        told.check_text()
        if config.image_branch:
            told.check_seen()
        if config.variant.image:
            told.check_picture()
        if config.vace_layers:
            told.check_controls()
        told.check_references()
        for kind in KINDS.values():
            if kind.entry and kind.part in config.parts:
                told.check_kind(kind)


def _entries(sampling: CoreSampling) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entries in sampling.conds.items():
        for entry in entries:
            yield name, entry


class _Told:
    """One entry.

    Args:
        where: whose it is, for messages.
    """

    def __init__(self, config: WanConfig, entry: Mapping[str, Any], where: str, sampling: CoreSampling) -> None:
        self._config, self._entry, self._where = config, entry, where
        self._frames, self._window = sampling.shape[2], sampling.window[2:]
        self._vae = config.variant.latents.vae

    def check_text(self) -> None:
        channels = self._config.text_dim
        self._shape(
            TEXT, self._entry[TEXT], ("B", "n", channels), "load umt5_xxl with Load CLIP, whose type is then wan"
        )

    def check_seen(self) -> None:
        """257 rows for each of one or two pictures."""
        seen, advice = self._entry[SEEN], "load clip_vision_h with Load CLIP Vision"
        states = getattr(seen, HIDDEN_STATES, None)
        if states is None:
            raise ValueError(f"{SEEN} {self._where} is {kind_of(seen)}; connect CLIP Vision Encode")
        shape = self._shape(SEEN, states, ("B", "n", self._config.clip_dim), advice)
        allowed = [PICTURE_ROWS * count for count in range(1, MAX_PICTURES + 1)]
        if shape[1] not in allowed:
            raise ValueError(
                f"{SEEN} {self._where} has {shape[1]} rows; this model ({self._config.variant.name}) takes "
                f"{' or '.join(map(str, allowed))}: {advice}"
            )

    def check_picture(self) -> None:
        """The latents behind what is sampled; ComfyUI scales rows and columns. Channels that are over are refused: it
        would cut them off and say nothing."""
        variant = self._config.variant
        channels = variant.image_latents * self._config.out_dim
        if (picture := self._entry.get(PICTURE)) is not None:
            # As many as a VAE would have given, or as the node of another model adds.
            of_a_vae = getattr(picture, "shape", ())[1:2] in [(variant.image_latents * own,) for own in LATENT_SPACES]
            advice = (
                f"encode it with the {self._vae}"
                if of_a_vae
                else f"it is of a node for another model, take the one for {variant.name}"
            )
            self._frames_fit(PICTURE, self._shape(PICTURE, picture, ("B", channels, "T", "h", "w"), advice)[2])
        if (mask := self._entry.get(PICTURE_MASK)) is not None:
            frames = self._shape(
                PICTURE_MASK, mask, ("B", "1 or 4", "T", "h", "w"), "take the node's that gives the picture"
            )
            # What is missing of it ComfyUI adds.
            self._frames_fit(PICTURE_MASK, max(frames[2], self._frames))

    def check_controls(self) -> None:
        control, encode = self._config.control_dim, f"encode it with the {self._vae}"
        frames, masks = (self._listed(key) for key in (VACE_FRAMES, VACE_MASKS))
        for strength in self._listed(VACE_STRENGTHS):
            number(f"{VACE_STRENGTHS} {self._where}", strength, -MAX_CONTROL_STRENGTH, MAX_CONTROL_STRENGTH)
        of_mask = WAN21.stride**2
        sizes = {
            f"{key} {self._where}": self._shape(key, one, ("B", channels, "T", "h", "w"), encode)[2:]
            for key, ones, channels in ((VACE_FRAMES, frames, control - of_mask), (VACE_MASKS, masks, of_mask))
            for one in ones
        }
        if len(set(sizes.values())) > 1 or (frames and masks and len(frames) != len(masks)):
            raise ValueError(
                f"{VACE_FRAMES} {self._where} are of {self._sizes(frames)} latent frames, rows and columns, and "
                f"{VACE_MASKS} of {self._sizes(masks)}; all must be of one size: give every "
                "WanVaceToVideo the same width, height, length and as many reference images"
            )
        self._check_amount(len(frames) or 1, next(iter(sizes.values()), self._window))

    def _check_amount(self, controls: int, size: tuple[int, ...]) -> None:
        """How many there are, and their bytes.

        Args:
            controls: at least the empty one that ComfyUI makes where none is given.
            size: of each, in latent frames, rows and columns.
        """
        kind = KINDS["controls"]
        strengths = self._listed(VACE_STRENGTHS)
        if strengths and len(strengths) != controls:
            raise ValueError(
                f"{VACE_STRENGTHS} {self._where} is {strengths!r}; it must be a list of {counted(controls, 'number')}, "
                f"one for each {kind.what}"
            )
        # A context window has its part of them.
        volume = math.prod(map(min, size, self._window))
        taken = controls * self._config.control_dim * volume * FLOAT_BYTES
        if controls > kind.most or taken > MAX_CONTROL_BYTES:
            raise ValueError(
                f"the {self._where.removeprefix('of the ')} has {counted(controls, kind.what)}, {taken / GIB:.1f} GiB; "
                f"a sampling on several GPUs takes at most {kind.most}, and {MAX_CONTROL_BYTES / GIB:g} GiB. Chain "
                "fewer WanVaceToVideo, or make the video smaller or shorter"
            )

    def check_references(self) -> None:
        """The last one counts, and of it the first frame; ComfyUI scales it for any model."""
        if held := self._listed(REFERENCES):
            shape = ("B", self._config.out_dim, "T", "h", "w")
            self._shape(REFERENCES, held[-1], shape, f"encode it with the {self._vae}")

    def check_kind(self, kind: Kind) -> None:
        """Of one tensor. Its size is that of the latents, which may be an area's."""
        if (value := self._entry.get(kind.entry)) is not None:
            self._shape(kind.entry, value, ("B", kind.channels(self._config), *kind.sides), kind.source)

    def _listed(self, key: str) -> list[Any]:
        held = self._entry.get(key)
        if held is None:
            return []
        if not isinstance(held, list | tuple) or not held:
            raise ValueError(f"{key} {self._where} is {kind_of(held)}; it must be a list of latents")
        return list(held)

    def _shape(self, key: str, value: Any, expected: tuple[int | str, ...], advice: str) -> tuple[int, ...]:
        """Of a tensor of finite numbers.

        Args:
            expected: a size, or what stands for any.
        """
        name = f"{key} {self._where}"
        shown = f"[{listed(expected)}]"
        shape = tuple(tensor_of(value, name, f"a tensor {shown}", mask=key in (PICTURE_MASK, VACE_MASKS)).shape)
        fits = len(shape) == len(expected) and 0 not in shape
        if not fits or any(
            isinstance(size, int) and size != given for size, given in zip(expected, shape, strict=True)
        ):
            raise ValueError(
                f"{name} is [{listed(shape)}]; this model ({self._config.variant.name}) takes {shown}: {advice}"
            )
        return shape

    def _frames_fit(self, key: str, frames: int) -> None:
        if frames != self._frames:
            raise ValueError(
                f"{key} {self._where} is of {frames} latent frames, and what is sampled of {self._frames}: take the "
                "latents of the node that gives it"
            )

    def _sizes(self, tensors: list[Any]) -> str:
        return listed(list(tensor.shape[2:]) for tensor in tensors)
