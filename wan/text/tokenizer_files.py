"""The tokenizer's files beside a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .tokenizer_bounds import MAX_JSON_BYTES, MAX_SPIECE_BYTES

TOKENIZER_JSON = "tokenizer.json"
SPIECE_SUFFIX = ".model"
EXPECTED = f"{TOKENIZER_JSON} or spiece.model of google/umt5-xxl"

_FOLDERS = ("google/umt5-xxl", "umt5-xxl", "tokenizer", "../tokenizer", "../google/umt5-xxl", ".")
"""Relative to the text encoder: the official layout, ComfyUI's folders, diffusers' layout."""


def find_tokenizer_files(text_encoder: str | Path) -> tuple[Path, ...]:
    """The tokenizer files beside a text encoder's file, most exact first; empty if there are none."""
    folder = Path(text_encoder).parent
    for relative in _FOLDERS:
        found = [
            path for path in ((folder / relative) / name for name in (TOKENIZER_JSON, "spiece.model")) if path.is_file()
        ]
        if found:
            return tuple(path.resolve() for path in found)
    return ()


def choose_tokenizer_file(files: Sequence[str | Path], text_encoder: str) -> Path:
    """tokenizer.json if it is there (the official tokenizer reads it), else the SentencePiece model.

    Args:
        files: candidates; others are ignored.
        text_encoder: label of the encoder, for messages.
    Raises:
        ValueError: none of the files is a tokenizer, or it is missing or empty.
    """
    paths = [Path(file) for file in files]
    chosen = [path for path in paths if path.name == TOKENIZER_JSON]
    chosen += [path for path in paths if path.suffix == SPIECE_SUFFIX]
    if not chosen:
        given = f"the tokenizer files given are {', '.join(map(str, paths))}" if paths else "no tokenizer was found"
        raise ValueError(
            f"{text_encoder} carries no tokenizer and {given}; expected {EXPECTED} in a folder google/umt5-xxl "
            "beside it, or a text encoder file made for ComfyUI, which carries one"
        )
    try:
        size = chosen[0].stat().st_size
    except OSError as error:
        raise ValueError(f"{chosen[0]} cannot be read: {error.strerror or error}; expected {EXPECTED}") from error
    if size == 0:
        raise ValueError(f"{chosen[0]} is an empty file; expected {EXPECTED}")
    limit = MAX_JSON_BYTES if chosen[0].name == TOKENIZER_JSON else MAX_SPIECE_BYTES
    if size > limit:
        raise ValueError(f"{chosen[0]} has {size} bytes; at most {limit} are allowed; expected {EXPECTED}")
    return chosen[0]
