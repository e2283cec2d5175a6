"""One evaluation as it is asked for: what is JSON of it. Both ends hold it against the same bounds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..job.errors import JobError, check
from ..job.strict_json import build

MAX_BATCH = 64
MAX_FRAMES = 1025
"""Latent ones: of 4097."""
MAX_SIDE = 1024
"""Latent rows and columns: of 8192 pixels."""
MAX_CHANNELS = 256
"""The largest model has 48."""
MAX_BYTES = 2 << 30
"""Of a batch's latents."""
MAX_TEXT_ROWS = 1 << 13
"""ComfyUI joins prompts of 512 rows each."""
MAX_TEXT_CHANNELS = 1 << 14
MAX_TEXTS = 128
"""That the ranks keep, with pictures: no fewer than one batch may have."""
FLOAT_BYTES = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Of the dtypes that a text may have."""
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class SentText:
    """A text that the ranks do not have yet, and that comes with the evaluation."""

    key: str
    """SHA-256 of what it is, hexadecimal."""
    rows: int
    channels: int
    dtype: str
    """A key of `ITEM_BYTES`."""

    def __post_init__(self) -> None:
        check(_KEY.fullmatch(self.key) is not None, "key", self.key, "64 hexadecimal digits")
        check(1 <= self.rows <= MAX_TEXT_ROWS, "rows of a text", self.rows, f"1 to {MAX_TEXT_ROWS}")
        ok = 1 <= self.channels <= MAX_TEXT_CHANNELS
        check(ok, "channels of a text", self.channels, f"1 to {MAX_TEXT_CHANNELS}")
        check(self.dtype in ITEM_BYTES, "dtype of a text", self.dtype, f"one of {', '.join(ITEM_BYTES)}")

    @property
    def nbytes(self) -> int:
        return self.rows * self.channels * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A batch of latents, all of one shape, each at its own timestep and with its own text."""

    shape: tuple[int, ...]
    """Samples, channels in, latent frames, rows and columns."""
    by_frame: bool
    """Each latent frame has a timestep of its own."""
    texts: tuple[str, ...]
    """For each sample the key of its text."""
    conditional: tuple[bool, ...]
    """For each sample: of the prompt, not of the negative prompt."""
    pictures: tuple[str, ...] = ()
    """For each sample the key of what CLIP sees in its pictures; none where the model does not look at any."""
    sent: tuple[SentText, ...] = ()
    """Texts and pictures, in the order of their bytes."""

    def __post_init__(self) -> None:
        check(len(self.shape) == 5, "shape", list(self.shape), "[samples, channels, frames, rows, columns]")
        batch, channels, frames, *sides = self.shape
        check(1 <= batch <= MAX_BATCH, "samples", batch, f"1 to {MAX_BATCH} at a time")
        check(1 <= channels <= MAX_CHANNELS, "latent channels", channels, f"1 to {MAX_CHANNELS}")
        check(1 <= frames <= MAX_FRAMES, "latent frames", frames, f"1 to {MAX_FRAMES}")
        for side in sides:
            check(2 <= side <= MAX_SIDE and side % 2 == 0, "latent rows or columns", side, f"even, 2 to {MAX_SIDE}")
        check(self.latent_bytes <= MAX_BYTES, "bytes of latents", self.latent_bytes, f"at most {MAX_BYTES}")
        for name, values in (("texts", self.texts), ("conditional", self.conditional)):
            check(len(values) == batch, name, len(values), f"one for each of {batch} samples")
        check(
            len(self.pictures) in (0, batch),
            "pictures",
            len(self.pictures),
            f"one for each of {batch} samples, or none",
        )
        check(all(_KEY.fullmatch(key) for key in self.keys), "texts", self.keys, "keys of 64 hexadecimal digits")
        keys = [text.key for text in self.sent]
        ok = len(set(keys)) == len(keys) and set(keys) <= set(self.keys)
        check(ok, "sent", keys, "texts of this evaluation, each once")

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all that the samples are told."""
        return self.texts + self.pictures

    @property
    def latent_bytes(self) -> int:
        return math.prod(self.shape) * FLOAT_BYTES

    @property
    def timestep_count(self) -> int:
        return self.shape[0] * (self.shape[2] if self.by_frame else 1)

    @property
    def pairs(self) -> list[int]:
        """The samples in the order in which two at a time may be computed: of the prompt, of the negative prompt."""
        order = list(range(len(self.conditional)))
        prompt = [index for index in order if self.conditional[index]]
        negative = [index for index in order if not self.conditional[index]]
        if len(prompt) != len(negative):
            return order
        return [index for pair in zip(prompt, negative, strict=True) for index in pair]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the ranks are asked for, one after another."""

    number: int
    """1, 2, ..."""
    evaluation: Evaluation | None
    """None: the sampling is over."""

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Request:
        """Reads what `to_json` wrote. Raises JobError naming what is missing, unknown or out of bounds."""
        try:
            request: Request = build(cls, json.loads(data), "request")
        except (ValueError, RecursionError) as error:
            raise JobError(f"an evaluation was asked for that this version cannot compute: {error}") from error
        return request


class TextKeys:
    """Which texts the ranks have. Both ends count the same, so that neither has to ask the other."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}
        """The one that was used last is last."""

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those that are to be sent, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._keys]

    def use(self, keys: Sequence[str]) -> list[str]:
        """Notes that an evaluation has these texts. Returns those that there is no room for any more."""
        for key in keys:
            self._keys.pop(key, None)
            self._keys[key] = None
        dropped = list(self._keys)[:-MAX_TEXTS]
        for key in dropped:
            del self._keys[key]
        return dropped
