"""The prompts of one job after another, encoded on the rank; the encoder waits in host memory between jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..job.job import FileIdentity, Job
from ..machine.host_memory import available_bytes
from ..weights.offload import HostParking

if TYPE_CHECKING:
    from ...wan.text.text_encoder import TextEncoder

log = logging.getLogger(__name__)


class PromptEncoder:
    """Loads umT5 for the first job with prompts. 11 GB are read for it, so that a group that stays keeps it, off the
    GPU, where the host has room for it twice."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made_of: tuple[FileIdentity, ...] = ()
        self._encoder: TextEncoder | None = None
        self._parking: HostParking | None = None
        self.notes: list[str] = []
        """On the prompts that were encoded last."""

    def encode(self, job: Job, *, negative: bool, say: Callable[[str], None] = lambda text: None) -> list[Tensor]:
        """The job's prompt and, if asked for, its negative one -> their tokens [n, text_dim], n <= 512.

        Args:
            say: told what is done.
        Raises:
            ValueError: the files are not an encoder and its tokenizer.
        """
        from ...wan.text.text_encoder import DEFAULT_NEGATIVE_PROMPT

        say("loading the text encoder")
        text, encoder = job.text, self._load(job)
        say("encoding the prompt")
        assert text is not None, "asked only where a job has prompts"
        prompts = {"prompt": text.prompt}
        if negative:
            prompts["negative_prompt"] = text.negative_prompt or DEFAULT_NEGATIVE_PROMPT
        texts = encoder.encode(list(prompts.values()))
        self.notes = encoder.tokenizer.notes(**prompts)
        self._rest(job)
        return texts

    def _load(self, job: Job) -> TextEncoder:
        from ...wan.text.text_encoder import load_text_encoder

        model = job.model
        made_of = (*model.text_encoder, *model.tokenizer)
        if self._encoder is not None and made_of == self._made_of:
            if self._parking is not None:
                self._parking.fetch()
            return self._encoder
        self.drop()
        on_cuda = self._device.type == "cuda"
        encoder = load_text_encoder(
            [file.path for file in model.text_encoder],
            [file.path for file in model.tokenizer],
            dtype=torch.bfloat16 if on_cuda else torch.float32,
            device=self._device,
        )
        for file in made_of:
            # Of one that was replaced while it was read this encoder is half.
            file.check_unchanged()
        # On a CPU it is in host memory anyway.
        self._parking = HostParking(encoder.model, keep=True) if on_cuda else None
        self._encoder, self._made_of = encoder, made_of
        return encoder

    def _rest(self, job: Job) -> None:
        """After the prompts: off the device."""
        size = sum(file.size for file in job.model.text_encoder)
        kept = self._parking is not None and self._parking.has_copy
        available = available_bytes()
        # Experts that wait in host memory were planned with all of it.
        stays = job.parallel.stays and not job.parallel.parks_experts
        if not stays or not (kept or available is None or available > 2 * size):
            self.drop()
        elif self._parking is not None:
            self._parking.park()

    def drop(self) -> None:
        """Frees all memory."""
        if self._parking is not None:
            self._parking.drop()
        self._encoder = self._parking = None
