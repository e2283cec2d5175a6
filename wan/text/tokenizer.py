"""Prompt text -> token ids, as the official code does it."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

from ..model.config import TEXT_LEN
from .tokenizer_bounds import read_sentencepiece, read_tokenizer_json
from .tokenizer_files import EXPECTED, TOKENIZER_JSON

_log = logging.getLogger(__name__)


def clean(text: str) -> str:
    """Repairs mis-decoded text, resolves HTML entities and joins runs of whitespace."""
    try:
        import ftfy
    except ImportError:
        _log.warning("ftfy is not installed: mis-decoded characters in prompts are not repaired (pip install ftfy)")
    else:
        text = ftfy.fix_text(text)
    # Twice: text copied from web pages is often escaped twice.
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """umT5's tokenizer, from either of its file formats.

    Args:
        source: path of a tokenizer.json or of a SentencePiece model, or a SentencePiece model's bytes.
        label: the file, for messages; the path by default.
    Raises:
        ValueError: naming the file and what was expected.
    """

    def __init__(self, source: str | Path | bytes, *, label: str | None = None) -> None:
        self.label = label or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
        self._json: Any = None
        self._pieces: Any = None
        try:
            if not isinstance(source, bytes) and Path(source).name == TOKENIZER_JSON:
                from tokenizers import Tokenizer as JsonTokenizer

                self._json = JsonTokenizer.from_str(read_tokenizer_json(source))
                self._json.no_padding()
                self._json.no_truncation()
            else:
                from sentencepiece import SentencePieceProcessor

                self._pieces = SentencePieceProcessor()
                self._pieces.LoadFromSerializedProto(read_sentencepiece(source))
        except ImportError:
            raise
        # The libraries raise bare Exception and RuntimeError for a damaged file.
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"{self.label} cannot be read as a tokenizer: {reason[0] if reason else type(error).__name__}; "
                f"expected {EXPECTED}"
            ) from error
        end = self._json.token_to_id("</s>") if self._json is not None else self._pieces.eos_id()
        if end is None or end < 0:
            raise ValueError(f"{self.label} has no end-of-text token </s>; expected {EXPECTED}")
        self.end_id: int = end

    @property
    def vocab(self) -> int:
        """Ids are below this."""
        return self._pieces.get_piece_size() if self._json is None else self._json.get_vocab_size()

    def __call__(self, text: str) -> list[int]:
        """Token ids of a prompt: cleaned, at most 512, the last one is the end of text; longer ones are cut."""
        return [*self._ids(text)[: TEXT_LEN - 1], self.end_id]

    def notes(self, **prompts: str) -> list[str]:
        """What the user should know of prompts, by what he calls them: those that are cut."""
        lengths = {name: len(self._ids(text)) + 1 for name, text in prompts.items()}
        return [
            f"{name} has {length} tokens; it was cut to {TEXT_LEN}, which is what the model takes"
            for name, length in lengths.items()
            if length > TEXT_LEN
        ]

    def _ids(self, text: str) -> list[int]:
        text = clean(text)
        if self._json is not None:
            return self._json.encode(text, add_special_tokens=False).ids
        return self._pieces.encode(text)
