"""What CLIP sees in the pictures of one video after another; the model is read when it is asked, and dropped."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .clip_encoder import encode_pictures, load_clip


class SeenPictures:
    """On one device. The last features stay: the next video of the same pictures needs no CLIP."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._version: Hashable = None
        self._pictures: Tensor | None = None
        self._features: Tensor | None = None

    def features(
        self,
        files: Sequence[str | Path],
        pictures: Tensor,
        *,
        version: Hashable = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Tensor:
        """[n * 257, dim], float32, on the CPU, of pictures [n, 3, 224, 224].

        Args:
            files: of a CLIP vision model, as for `load_clip`.
            version: of these files.
            say: told what is done.
        Raises:
            ValueError: they are no such model's.
        """
        same = self._pictures is not None and torch.equal(self._pictures, pictures) and self._version == version
        if self._features is None or not same:
            self._features = None
            self._features = self._seen(files, pictures, say)
            self._version, self._pictures = version, pictures.clone()
        return self._features

    def _seen(self, files: Sequence[str | Path], pictures: Tensor, say: Callable[[str], None]) -> Tensor:
        say("loading CLIP's vision model")
        on_cuda = self._device.type == "cuda"
        # As the official code.
        model = load_clip(files, dtype=torch.float16 if on_cuda else torch.float32, device=self._device)
        say("looking at the picture" if len(pictures) == 1 else "looking at the pictures")
        features = encode_pictures(model, pictures).cpu()
        del model
        if on_cuda:
            # What comes next is larger, and of other sizes.
            torch.cuda.empty_cache()
        return features
