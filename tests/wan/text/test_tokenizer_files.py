"""Tokenizers in their files: where they are looked for, what of a GGUF is one, and what is none."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import STRING, file, text, value
from umt5 import _fields, train_spiece
from wan_pack.wan.files.gguf_files import GgufFile
from wan_pack.wan.text import tokenizer, tokenizer_bounds, tokenizer_files
from wan_pack.wan.text.gguf_tokenizer import carries_tokenizer, sentencepiece_model
from wan_pack.wan.text.tokenizer import Tokenizer
from wan_pack.wan.text.tokenizer_bounds import read_sentencepiece, read_tokenizer_json
from wan_pack.wan.text.tokenizer_files import choose_tokenizer_file, find_tokenizer_files

KEY = "tokenizer.ggml."
PIECES = (("<pad>", 0.0, 3), ("</s>", -0.5, 3), ("<unk>", -1.0, 2), ("\u2581a", -2.25, 1), ("x" * 200, -300.5, 1))
UINT8, INT8, INT32, FLOAT32, BOOL, FLOAT64 = 0, 1, 5, 6, 7, 12


def carried(**changed: bytes | None) -> dict[str, bytes]:
    """The metadata of a tokenizer, with other values or without some."""
    tokens, scores, types = zip(*PIECES, strict=True)
    values = {
        "model": value(f"{KEY}model", STRING, "t5"),
        "tokens": value(f"{KEY}tokens", STRING, *tokens),
        "scores": value(f"{KEY}scores", FLOAT32, *scores),
        "token_type": value(f"{KEY}token_type", INT32, *types),
    }
    return {name: one for name, one in (values | changed).items() if one is not None}


def opened(folder: Path, **changed: bytes | None) -> GgufFile:
    return GgufFile(file(folder / "x.gguf", list(carried(**changed).values())))


def test_each_piece_and_rule_of_a_gguf_has_its_field(tmp_path: Path) -> None:
    """By SentencePiece's own numbers: a model's pieces 1, trainer 2 and normaliser 3."""
    charsmap = value(f"{KEY}precompiled_charsmap", INT8, -1, 1, -128)
    found = _fields(sentencepiece_model(opened(tmp_path, precompiled_charsmap=charsmap)))
    assert [number for number, _ in found] == [1] * len(PIECES) + [2, 3]
    pieces = [dict(_fields(message)) for number, message in found if number == 1]
    assert [(piece[1].decode(), *struct.unpack("<f", piece[2]), piece[3]) for piece in pieces] == list(PIECES)
    assert _fields(found[-2][1]) == [(3, 1), (35, 0)], "Unigram, without pieces of bytes"
    assert _fields(found[-1][1]) == [(2, b"\xff\1\x80"), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ("changed", "trainer", "normaliser"),
    [
        ({"token_type": value(f"{KEY}token_type", INT32, 3, 3, 2, 6, 6)}, {35: 1}, {}),
        ({"space": value(f"{KEY}add_space_prefix", BOOL, False)}, {}, {3: 0}),
        ({"space": value(f"{KEY}remove_extra_whitespaces", BOOL, False)}, {}, {4: 0}),
        ({"none": text(f"{KEY}precompiled_charsmap") + struct.pack("<IIQ", 9, UINT8, 0)}, {}, {}),
        ({"long": value(f"{KEY}precompiled_charsmap", UINT8, *range(256))}, {}, {2: bytes(range(256))}),
    ],
    ids=["bytes", "no space before", "spaces kept", "an empty table", "a long table"],
)
def test_rules_are_those_of_the_metadata(
    tmp_path: Path, changed: dict[str, bytes], trainer: dict[int, Any], normaliser: dict[int, Any]
) -> None:
    *_, (_, first), (_, second) = _fields(sentencepiece_model(opened(tmp_path, **changed)))
    assert dict(_fields(first)) == {3: 1, 35: 0} | trainer
    assert dict(_fields(second)) == {2: b"", 3: 1, 4: 1} | normaliser


@pytest.mark.parametrize("missing", ["model", "tokens", "scores", "token_type"])
def test_a_tokenizer_of_which_a_part_is_missing_is_none(tmp_path: Path, missing: str) -> None:
    assert carries_tokenizer(opened(tmp_path))
    assert not carries_tokenizer(opened(tmp_path, **{missing: None}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": value(f"{KEY}tokens", INT32, 1, 2, 3, 4, 5)}, "tokens is not a list of str values"),
        ({"scores": value(f"{KEY}scores", INT32, 1, 2, 3, 4, 5)}, "scores is not a list of float values"),
        ({"scores": value(f"{KEY}scores", FLOAT32, 1.0)}, "scores is not a list of float values"),
        ({"token_type": value(f"{KEY}token_type", BOOL, *[True] * 5)}, "token_type is not a list of int values"),
        ({"tokens": value(f"{KEY}tokens", STRING, "a", "b")}, "it has 2 tokens, 5 scores and 5 types"),
        ({"scores": value(f"{KEY}scores", FLOAT32, 1, 2, 3)}, "it has 5 tokens, 3 scores and 5 types"),
        ({"token_type": value(f"{KEY}token_type", INT32, 1, 2)}, "it has 5 tokens, 5 scores and 2 types"),
        ({"scores": value(f"{KEY}scores", FLOAT64, *[1e300] * 5)}, "too large"),
        ({"map": value(f"{KEY}precompiled_charsmap", STRING, "a", "b")}, "charsmap is not a list of int values"),
    ],
)
def test_a_damaged_tokenizer_names_its_file(tmp_path: Path, changed: dict[str, bytes], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'x.gguf'} carries a damaged tokenizer: .*{words}"):
        sentencepiece_model(opened(tmp_path, **changed))


PLACES = ("google/umt5-xxl", "umt5-xxl", "tokenizer", "../tokenizer", "../google/umt5-xxl", ".")


def test_a_tokenizer_is_looked_for_in_these_folders_the_first_of_which_counts(tmp_path: Path) -> None:
    encoder = tmp_path / "models" / "text" / "umt5.safetensors"
    encoder.parent.mkdir(parents=True)
    for place in reversed(PLACES):
        folder = (encoder.parent / place).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("spiece.model", "tokenizer.json"):
            (folder / name).touch()
            found = find_tokenizer_files(encoder)
            # As a path that another process can open, and with no way back in it.
            assert [str(path) for path in found] == sorted(
                (str(folder / each) for each in ("spiece.model", "tokenizer.json")[: 1 + (name != "spiece.model")]),
                reverse=True,
            )


def test_a_tokenizer_json_is_preferred_and_others_are_ignored(tmp_path: Path) -> None:
    names = ("notes.txt", "spiece.model", "other.model", "tokenizer.json", "config.json")
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text("x")
    assert choose_tokenizer_file(paths, "umt5") == tmp_path / "tokenizer.json"
    assert choose_tokenizer_file(paths[:3], "umt5") == tmp_path / "spiece.model"


@pytest.mark.parametrize(("name", "limit"), [("tokenizer.json", 20), ("spiece.model", 10)])
def test_each_kind_of_file_has_its_own_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    for module in (tokenizer_files, tokenizer_bounds):
        monkeypatch.setattr(module, "MAX_JSON_BYTES", 20)
        monkeypatch.setattr(module, "MAX_SPIECE_BYTES", 10)
    read: Callable[[Path], object] = read_tokenizer_json if name == "tokenizer.json" else read_sentencepiece
    path = tmp_path / name
    path.write_bytes(b"\x0a\x08" + bytes(limit - 2) if name == "spiece.model" else b"1".ljust(limit))
    assert choose_tokenizer_file([path], "umt5") == path
    assert read(path) == (path.read_bytes() if name == "spiece.model" else path.read_text())
    with path.open("ab") as longer:
        longer.write(b" ")
    for refuse in (lambda: choose_tokenizer_file([path], "umt5"), lambda: read(path)):
        with pytest.raises(ValueError, match=f"has {limit + 1} bytes; at most {limit} are allowed"):
            refuse()


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"", True),
        (b"\x0a\x00" * 3, True),
        (b"\x0a\x03abc\x12\x00", True),
        # A length of three bytes.
        (b"\x0a\x81\x80\x01" + bytes(1 + (1 << 14)) + b"\x0a\x00", True),
        # A number of ten bytes.
        (b"\x8a" + b"\x80" * 8 + b"\x00" + b"\x01x", True),
        (b"\x0a\x00" * 4, "over 3 pieces"),
        (b"\x08\x00", "it is not a SentencePiece model$"),
        (b"\x0a\x03abc\x18\x00", "it is not a SentencePiece model$"),
        (b"\x0a", "it is not a SentencePiece model, or cut"),
        (b"\x0a\x80", "it is not a SentencePiece model, or cut"),
        (b"\x8a" + b"\x80" * 9 + b"\x00", "it is not a SentencePiece model, or cut"),
    ],
)  # fmt: skip
def test_the_pieces_of_a_model_are_counted(monkeypatch: pytest.MonkeyPatch, data: bytes, whole: bool | str) -> None:
    monkeypatch.setattr(tokenizer_bounds, "MAX_PIECES", 3)
    if isinstance(whole, bool):
        assert read_sentencepiece(data) == data
    else:
        with pytest.raises(ValueError, match=whole):
            read_sentencepiece(data)


@pytest.mark.parametrize(
    ("message", "reason"), [("", "RuntimeError"), ("\n why \nmore", "why ; expected"), ("why", "why; expected")]
)
def test_what_a_library_says_first_is_said(monkeypatch: pytest.MonkeyPatch, message: str, reason: str) -> None:
    def read(source: object) -> bytes:
        raise RuntimeError(message)

    monkeypatch.setattr(tokenizer, "read_sentencepiece", read)
    with pytest.raises(ValueError, match=f"^3 bytes cannot be read as a tokenizer: {reason}"):
        Tokenizer(b"abc")


def trained(**options: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat walks on the grass"] * 20), model_writer=model, vocab_size=30,
        hard_vocab_limit=False, bos_id=-1, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def test_the_end_of_a_text_is_the_models_own(tmp_path: Path) -> None:
    """The first id is one as well; a model that has none is of no use."""
    assert Tokenizer(trained(eos_id=0, unk_id=1, pad_id=-1))("a cat")[-1] == 0
    with pytest.raises(ValueError, match=r"^mine has no end-of-text token </s>; expected tokenizer\.json or"):
        Tokenizer(trained(eos_id=-1, unk_id=0, pad_id=-1), label="mine")
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=f"^{path} has no end-of-text token </s>"):
        Tokenizer(path)
    assert Tokenizer(train_spiece()).end_id == 1


def test_a_missing_library_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError):
        Tokenizer(train_spiece())
