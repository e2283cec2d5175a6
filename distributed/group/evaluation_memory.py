"""The memory through which evaluations are asked for and answered: one for a sampling, in no folder, with no port.

    [numbers, 64 bytes][request, JSON, to 64 KiB][latents][timesteps][texts and controls that are new][velocity]

Where the parts lie follows from the request, which both ends hold against the same bounds (evaluation_request.py).
Numbers are written last: what they speak of is whole then. The next request is written when the last one is answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..job.errors import JobError, check
from ..job.job import FLOAT_BYTES
from ..machine.memory_file import MemoryFile, OpenedMemory
from .evaluation_request import Evaluation, Request

Bytes = bytes | bytearray | memoryview
HEADER = 64 << 10
REQUEST = 64
"""Where it begins."""
ALIGNMENT = 64
ASKED, BYTES, ANSWERED, CHANNELS = (8 * place for place in range(4))
"""Where the numbers are: of the last request, of its bytes, of the last one answered, of its velocity's channels."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of an evaluation lie."""

    latents: slice
    timesteps: slice
    sent: tuple[slice, ...]
    """Of texts, pictures and controls."""
    velocity: slice
    """Room for as many channels as the latents have: no model gives more than it takes."""
    size: int

    @classmethod
    def of(cls, evaluation: Evaluation) -> Places:
        at, places = HEADER, []
        for size in (
            evaluation.latent_bytes, evaluation.timestep_count * FLOAT_BYTES,
            *(one.nbytes for one in evaluation.sent), evaluation.latent_bytes,
        ):  # fmt: skip
            places.append(slice(at, at + size))
            at += -(-size // ALIGNMENT) * ALIGNMENT
        latents, timesteps, *sent, velocity = places
        return cls(latents, timesteps, tuple(sent), velocity, at)


class _End:
    """What both have."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def _number(self, place: int) -> int:
        value: int = struct.unpack_from("<Q", self._memory, place)[0]
        return value

    def _set(self, place: int, value: int) -> None:
        struct.pack_into("<Q", self._memory, place, value)

    def _map(self, file: MemoryFile | OpenedMemory, size: int) -> None:
        """Takes more of it."""
        if size > len(self._memory):
            before, self._memory = self._memory, file.map(size)
            _unmap(before)


class AskingEnd(_End):
    """ComfyUI's."""

    def __init__(self) -> None:
        self._file = MemoryFile("wan-evaluations")
        super().__init__(self._file.map(HEADER))

    @property
    def path(self) -> Path:
        """For the other end, as long as this one is open."""
        return self._file.path

    def ask(self, request: Request, parts: Iterable[Bytes] = ()) -> None:
        """Writes the next request.

        Args:
            parts: of its evaluation: latents, timesteps, what is sent.
        """
        data = request.to_json()
        check(len(data) <= HEADER - REQUEST, "bytes of a request", len(data), f"at most {HEADER - REQUEST}")
        if request.evaluation is not None:
            places = Places.of(request.evaluation)
            self._map(self._file, places.size)
            for place, part in zip((places.latents, places.timesteps, *places.sent), parts, strict=True):
                self._memory[place] = memoryview(part).cast("B")
        self._memory[REQUEST : REQUEST + len(data)] = data
        self._set(BYTES, len(data))
        self._set(ASKED, request.number)

    @property
    def answered(self) -> int:
        """The number of the last request that is answered."""
        return self._number(ANSWERED)

    def velocity(self, evaluation: Evaluation) -> tuple[int, bytearray]:
        """The answer's channels, and its bytes. Raises JobError if there cannot be so many."""
        _, most, *_ = evaluation.shape
        channels, place = self._number(CHANNELS), Places.of(evaluation).velocity
        if not 1 <= channels <= most:
            raise JobError(f"the ranks answered with {channels} channels; there are at most {most}")
        size = evaluation.latent_bytes // most * channels
        return channels, bytearray(memoryview(self._memory)[place.start : place.start + size])

    def close(self) -> None:
        """The other end keeps what it has mapped. A second call does nothing."""
        self._file.close()
        _unmap(self._memory)


class AnsweringEnd(_End):
    """A rank's. Raises OSError or ValueError if the other end is gone."""

    def __init__(self, path: Path) -> None:
        self._file = OpenedMemory(path)
        super().__init__(self._file.map(HEADER))

    @property
    def asked(self) -> int:
        """The number of the last request."""
        return self._number(ASKED)

    def read(self) -> tuple[Request, bytes]:
        """The last request, and the SHA-256 of its JSON. Raises JobError if it is out of bounds."""
        size = self._number(BYTES)
        if size > HEADER - REQUEST:
            raise JobError(f"a request has {size} bytes; it must have at most {HEADER - REQUEST}")
        data = self._memory[REQUEST : REQUEST + size]
        return Request.from_json(data), hashlib.sha256(data).digest()

    def parts(self, evaluation: Evaluation) -> tuple[memoryview, memoryview, list[memoryview]]:
        """Latents, timesteps and what was sent, where they lie: to be read before the answer."""
        places = self._places(evaluation)
        memory = memoryview(self._memory)
        return memory[places.latents], memory[places.timesteps], [memory[place] for place in places.sent]

    def write(self, evaluation: Evaluation, channels: int, velocity: Bytes) -> None:
        """One rank puts down the answer; `say_answered` makes it known."""
        place, data = self._places(evaluation).velocity, memoryview(velocity).cast("B")
        assert len(data) == evaluation.latent_bytes // evaluation.shape[1] * channels <= evaluation.latent_bytes
        self._memory[place.start : place.start + len(data)] = data
        self._set(CHANNELS, channels)

    def say_answered(self, number: int) -> None:
        self._set(ANSWERED, number)

    def _places(self, evaluation: Evaluation) -> Places:
        places = Places.of(evaluation)
        self._map(self._file, places.size)
        return places

    def close(self) -> None:
        """A second call does nothing."""
        self._file.close()
        _unmap(self._memory)


def _unmap(memory: mmap.mmap) -> None:
    # It has a descriptor of its own. Where a tensor is still of this memory, it goes with that.
    with contextlib.suppress(BufferError):
        memory.close()
