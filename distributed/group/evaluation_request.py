"""One evaluation as it is asked for: what is JSON of it. Both ends hold it against the same bounds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...wan.model.latent_space import LATENT_SPACES
from ...wan.sampling.told import KINDS, Kind
from ..job.errors import JobError, check
from ..job.evaluator import ITEM_BYTES, KEPT_AT_LEAST, MAX_CONTROL_BYTES
from ..job.job import FLOAT_BYTES
from ..job.strict_json import build

MAX_SAMPLES = 2
"""One for each half of the ranks. What is more comes as further evaluations, between which the ranks give signs of life
and look for a cancel."""
MAX_FRAMES = 1025
"""Latent ones: of 4097."""
MAX_SIDE = 1024
"""Latent rows and columns: of 8192 pixels."""
MAX_CHANNELS = 256
"""The largest model has 48, and VACE's control 96."""
MAX_BYTES = 2 << 30
"""Of an evaluation's latents, and of one tensor that is sent with one."""
MAX_ROWS = 1 << 13
"""Of a text or of what CLIP sees: ComfyUI joins prompts of 512 rows each."""
MAX_ROW_CHANNELS = 1 << 14
MAX_SENT_BYTES = MAX_SAMPLES * (MAX_CONTROL_BYTES + (1 << 30))
"""Of all that is sent with one evaluation: a kind of each sample, and texts and others."""
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class SentTensor:
    """What the ranks do not have yet, and what comes with the evaluation."""

    key: str
    """SHA-256 of what it is, hexadecimal."""
    shape: tuple[int, ...]
    """Of rows: rows, channels. Of a volume: channels, frames, rows and columns."""
    dtype: str
    """A key of `ITEM_BYTES`."""

    def __post_init__(self) -> None:
        check(_KEY.fullmatch(self.key) is not None, "key", self.key, "64 hexadecimal digits")
        check(min(self.shape, default=0) >= 1, "shape of what is sent", list(self.shape), "of sizes from 1")
        check(self.dtype in ITEM_BYTES, "dtype of what is sent", self.dtype, f"one of {', '.join(ITEM_BYTES)}")
        check(self.nbytes <= MAX_BYTES, "bytes of what is sent", self.nbytes, f"at most {MAX_BYTES}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def check_rows(self) -> None:
        """As a text, or what CLIP sees."""
        check(len(self.shape) == 2, "shape of a text", list(self.shape), "[rows, channels]")
        rows, channels = self.shape
        check(rows <= MAX_ROWS, "rows of a text", rows, f"1 to {MAX_ROWS}")
        check(channels <= MAX_ROW_CHANNELS, "channels of a text", channels, f"1 to {MAX_ROW_CHANNELS}")

    def check_volume(self, kind: Kind, latents: tuple[int, ...]) -> None:
        """As one of a kind beside latents of this size: frames, rows and columns."""
        check(self.dtype == "float32", f"dtype of a {kind.what}", self.dtype, "float32")
        # Which of them the model has is known to the ranks.
        strides = [space.stride for space in LATENT_SPACES.values()]
        fits = any(kind.fits(self.shape, latents, stride) for stride in strides) and self.shape[0] <= MAX_CHANNELS
        of = f"1 to {MAX_CHANNELS} channels, and frames, rows and columns beside latents of {list(latents)}"
        check(fits, f"shape of a {kind.what}", list(self.shape), of)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToldKeys:
    """What the samples are told of a kind."""

    kind: str
    """A name in `KINDS`."""
    keys: tuple[tuple[str, ...], ...]
    """Of each sample's."""
    strengths: tuple[tuple[float, ...], ...]
    """Of each of them."""

    def __post_init__(self) -> None:
        check(self.kind in KINDS, "kind of what is told", self.kind, f"one of {', '.join(KINDS)}")
        most = KINDS[self.kind].most
        for keys in self.keys:
            check(1 <= len(keys) <= most, f"{self.kind} of a sample", len(keys), f"1 to {most}")
        counts = tuple(map(len, self.strengths))
        check(counts == tuple(map(len, self.keys)), "strengths", counts, f"one for each of {self.kind}")
        ok = all(math.isfinite(value) for values in self.strengths for value in values)
        check(ok, "strengths", self.strengths, "finite numbers")

    @property
    def all_keys(self) -> tuple[str, ...]:
        return tuple(key for keys in self.keys for key in keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A few latents of one shape, each at its own timestep and with its own text."""

    shape: tuple[int, ...]
    """Samples, channels in, latent frames, rows and columns."""
    by_frame: bool
    """Each latent frame has a timestep of its own."""
    texts: tuple[str, ...]
    """For each sample the key of its text."""
    told: tuple[ToldKeys, ...] = ()
    """A kind each."""
    sent: tuple[SentTensor, ...] = ()
    """Of all that the samples are told, what is new, in the order of its bytes."""

    def __post_init__(self) -> None:
        check(len(self.shape) == 5, "shape", list(self.shape), "[samples, channels, frames, rows, columns]")
        batch, channels, frames, *sides = self.shape
        check(1 <= batch <= MAX_SAMPLES, "samples", batch, f"1 to {MAX_SAMPLES} at a time")
        check(1 <= channels <= MAX_CHANNELS, "latent channels", channels, f"1 to {MAX_CHANNELS}")
        check(1 <= frames <= MAX_FRAMES, "latent frames", frames, f"1 to {MAX_FRAMES}")
        for side in sides:
            check(2 <= side <= MAX_SIDE and side % 2 == 0, "latent rows or columns", side, f"even, 2 to {MAX_SIDE}")
        check(self.latent_bytes <= MAX_BYTES, "bytes of latents", self.latent_bytes, f"at most {MAX_BYTES}")
        self._check_told(batch)
        self._check_sent()

    def _check_told(self, batch: int) -> None:
        check(len(self.texts) == batch, "texts", len(self.texts), f"one for each of {batch} samples")
        kinds = [one.kind for one in self.told]
        check(len(set(kinds)) == len(kinds), "kinds of what is told", kinds, "each once")
        for one in self.told:
            check(len(one.keys) == batch, one.kind, len(one.keys), f"one for each of {batch} samples, or none")
        # A key says of which kind it is.
        keys = list(dict.fromkeys(self.texts))
        keys += [key for one in self.told for key in dict.fromkeys(one.all_keys)]
        check(all(_KEY.fullmatch(key) for key in keys), "texts", keys, "keys of 64 hexadecimal digits")
        check(len(set(keys)) == len(keys), "keys", keys, "others for each kind than for the texts")

    def _check_sent(self) -> None:
        keys, kinds = [one.key for one in self.sent], self.kinds
        ok = len(set(keys)) == len(keys) and {*self.texts, *kinds}.issuperset(keys)
        check(ok, "sent", keys, "texts and what else is told in this evaluation, each once")
        for one in self.sent:
            if (kind := kinds.get(one.key)) is None or kind.size is None:
                one.check_rows()
            else:
                one.check_volume(kind, self.shape[2:])
        size = sum(one.nbytes for one in self.sent)
        check(size <= MAX_SENT_BYTES, "bytes of what is sent", size, f"at most {MAX_SENT_BYTES}")

    @property
    def kinds(self) -> dict[str, Kind]:
        """Key -> of which kind it is."""
        return {key: KINDS[one.kind] for one in self.told for key in one.all_keys}

    @property
    def rows(self) -> tuple[str, ...]:
        """Keys of texts and of what is rows of channels as they are."""
        return self.texts + tuple(key for key, kind in self.kinds.items() if kind.size is None)

    @property
    def volumes(self) -> tuple[str, ...]:
        """Keys of what has frames, rows and columns."""
        return tuple(key for key, kind in self.kinds.items() if kind.size is not None)

    @property
    def in_front(self) -> int:
        """Latent frames that are computed in front of those that are evaluated."""
        return sum(KINDS[one.kind].in_front for one in self.told)

    def count(self, kind: str) -> int:
        """The most that a sample is told of it."""
        return max((len(keys) for one in self.told if one.kind == kind for keys in one.keys), default=0)

    @property
    def latent_bytes(self) -> int:
        return math.prod(self.shape) * FLOAT_BYTES

    @property
    def timestep_count(self) -> int:
        return self.shape[0] * (self.shape[2] if self.by_frame else 1)


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


class SentKeys:
    """Which tensors of a kind the ranks have. Both ends count the same, so that neither has to ask the other.

    Args:
        most: bytes that are kept beyond one evaluation's.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes: dict[str, int] = {}
        """The one that was used last is last."""

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those that are to be sent, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._bytes]

    def use(self, keys: Sequence[str], sent: Iterable[SentTensor]) -> list[str]:
        """Notes that an evaluation has these. Returns those that there is no room for any more.

        Args:
            sent: what comes with it, of this kind and others.
        """
        known = self._bytes | {one.key: max(one.nbytes, KEPT_AT_LEAST) for one in sent}
        for key in keys:
            self._bytes.pop(key, None)
            self._bytes[key] = known.get(key, KEPT_AT_LEAST)
        size, dropped = sum(self._bytes.values()), []
        while size > self._most and (oldest := next(iter(self._bytes))) not in keys:
            size -= self._bytes.pop(oldest)
            dropped.append(oldest)
        return dropped
