"""The last header that is read and the first that is not; what files are called by their first bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wan_pack.wan.files import model_folder
from wan_pack.wan.files.headers import (
    DTYPE_BITS,
    HeadersTogether,
    brief,
    check_count,
    check_name,
    check_shape,
    describe_file,
    read_header,
)
from wan_pack.wan.files.json_text import check_json_size, parse_json
from wan_pack.wan.files.model_folder import folder_files, read_json_object, shard_files


def header(path: Path, entries: object, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WIDTHS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.complex64: "C64",
}  # fmt: skip


def test_dtypes_that_no_weight_has_are_known_by_their_size(tmp_path: Path) -> None:
    for dtype, name in WIDTHS.items():
        assert DTYPE_BITS[name] == 8 * dtype.itemsize, name
        save_file({"x": torch.zeros(4, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)}, tmp_path / "x")
        assert read_header(tmp_path / "x").tensors["x"].dtype == name
    # Of less than a byte: eight elements.
    for name, nbytes in (("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)):
        path = header(tmp_path / "x", {"x": entry(name, [2, 4], 0, nbytes)}, bytes(nbytes))
        assert read_header(path).tensors["x"].shape == (2, 4)
    path = header(tmp_path / "x", {"x": entry("F4", [3], 0, 2)}, bytes(2))
    with pytest.raises(ValueError, match=r"tensor 'x' \(F4, shape \[3\]\) takes 1 bytes, but .* \[0, 2\] hold 2"):
        read_header(path)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (16_777_216, "is truncated: its header alone promises 16777224 bytes, the file has "),
        (16_777_217, "has a header of 16777217 bytes; at most 16777216 are allowed"),
        (100_000_000, "has a header of 100000000 bytes; at most 16777216 are allowed"),
        (100_000_001, "is not a safetensors file: it is of an unknown format"),
    ],
)
def test_a_header_says_its_own_length(tmp_path: Path, length: int, words: str) -> None:
    path = header(tmp_path / "x.safetensors", {"a": 1}, length=length)
    with pytest.raises(ValueError, match=rf"x\.safetensors {words}"):
        read_header(path)
    assert describe_file(path) == ("of an unknown format" if length > 100_000_000 else "a safetensors file")


def test_a_header_may_end_with_its_file(tmp_path: Path) -> None:
    path = header(tmp_path / "x.safetensors", {})
    opened = read_header(path)
    assert (opened.tensors, opened.metadata, opened.nbytes) == ({}, {}, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="promises 10 bytes, the file has 9"):
        read_header(path)
    path.write_bytes(path.read_bytes()[:8])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(path)


def test_tensors_without_elements_take_no_place(tmp_path: Path) -> None:
    """However the header orders them, between two others or behind all."""
    entries = {
        "last": entry("F32", [0], 8, 8), "b": entry("F32", [1], 4, 8), "between": entry("F32", [2, 0], 4, 4),
        "a": entry("F32", [1], 0, 4), "first": entry("F32", [0], 0, 0),
    }  # fmt: skip
    opened = read_header(header(tmp_path / "x", entries, bytes(8)))
    begin = 8 + opened.nbytes
    assert {name: (info.start - begin, info.end - begin) for name, info in opened.tensors.items()} == {
        "last": (8, 8), "b": (4, 8), "between": (4, 4), "a": (0, 4), "first": (0, 0)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (entry("F32", [2**63 - 1], 0, 4), f"takes {4 * (2**63 - 1)} bytes"),
        (entry("F32", [2**63], 0, 4), "has shape"),
        (entry("F32", [1, -1], 0, 4), r"has shape \[1, -1\]"),
        (entry("F32", [1], 0, 2**63), "has data_offsets"),
        (entry("F32", [1], 0, 2**63 - 1), f"hold {2**63 - 1}"),
        (entry("F32", [1], 4, 0), "hold -4"),
        (entry("F32", [1], 0, 4) | {"strides": [1]}, "is not described by dtype, shape and data_offsets"),
    ],
)
def test_sizes_fit_into_63_bits(tmp_path: Path, tensor: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=f"damaged safetensors header: tensor 'x' .*{words}"):
        read_header(header(tmp_path / "x", {"x": tensor}, bytes(4)))


def test_notes_are_text(tmp_path: Path) -> None:
    for notes in ({"a": "b", "c": 1}, {"c": 1, "a": "b"}, ["a"], "a"):
        with pytest.raises(ValueError, match="__metadata__ is not an object of strings"):
            read_header(header(tmp_path / "x", {"__metadata__": notes}))


BEGINNINGS = {
    b"  <!DocType html>": "a web page", b"<html>": "a web page", b"\n<HEAD>": "a web page", b"<?xml?>": "a web page",
    b"{1": "a JSON file", b"\n [1": "a JSON file", b"\x80\x06}": "of an unknown format",
    b"\x80\x03}": "a Python pickle",
    b"\x80": "of an unknown format", b"\x81\x03}": "of an unknown format", bytes(8): "a file of zero bytes",
    bytes(8) + b"{": "a safetensors file", bytes(8) + b"}": "of an unknown format", b"12345678": "of an unknown format",
    b"VERSION https://git-lfs": "a git-lfs pointer", b"abGGUF": "of an unknown format", b"PK\x03": "of an unknown",
}  # fmt: skip


@pytest.mark.parametrize("start", BEGINNINGS)
def test_a_file_is_called_by_its_first_bytes(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x").write_bytes(start)
    assert describe_file(tmp_path / "x").startswith(BEGINNINGS[start])


def test_files_of_a_model_are_counted_together() -> None:
    together = HeadersTogether()
    together.add("a", 16_777_215, 16_383)
    together.add("b", 1, 1)
    for nbytes, tensors in ((1, 0), (0, 1)):
        other = HeadersTogether()
        other.add("a", 16_777_216, 16_384)
        with pytest.raises(ValueError, match=f"^c and .* {16_777_216 + nbytes} bytes with {16_384 + tensors} tensors"):
            other.add("c", nbytes, tensors)
    check_count(16_384)
    with pytest.raises(ValueError, match="it describes 16385 tensors; at most 16384 are allowed"):
        check_count(16_385)


def test_names_and_shapes_are_checked() -> None:
    assert check_name("\u00e9" * 500) == "\u00e9" * 500
    with pytest.raises(ValueError, match="a tensor name of 501 characters; at most 500"):
        check_name("a" * 501)
    check_shape("x", (1, 2), (1, 2), "m")
    with pytest.raises(ValueError, match=r"^m: tensor x has shape \[1, 2\]; the .* tensors call for \[2, 1\]$"):
        check_shape("x", (1, 2), (2, 1), "m")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ValueError("a" * 399), "a" * 399),
        (ValueError("a" * 400), "a" * 400 + "..."),
        (ValueError("a" * 401), "a" * 400 + "..."),
        (ValueError("a\n\x00b"), "a\\n\\x00b"),
        ("a" * 198, repr("a" * 198)),
        ("a" * 199, repr("a" * 97)[:-1] + "..." + repr("a" * 98)[1:]),
        (10**5000, "int with a number of thousands of digits"),
    ],
    ids=["399", "400", "401", "control characters", "198", "199", "a huge number"],
)
def test_what_a_file_holds_is_quoted_briefly(value: object, text: str) -> None:
    assert brief(value) == text


def test_parts_of_a_json_are_counted() -> None:
    """Commas and brackets, 16 levels, and four quotes for each of them."""
    text = b'{"a": [1, 2, {"b": 3}]}'
    assert parse_json(text, 5) == {"a": [1, 2, {"b": 3}]}
    with pytest.raises(ValueError, match="it holds over 4 values"):
        parse_json(text, 4)
    deep = b"[" * 16 + b"]" * 16
    assert parse_json(b'{"a": ' + deep[1:-1] + b"}", 99) is not None
    for wrong in (b"[" + deep + b"]", b"[[]", b"[}", b"{]"):
        with pytest.raises(ValueError, match="its brackets nest over 16 levels deep, or do not pair"):
            parse_json(wrong, 99)
    quotes = b'"' * 12
    check_json_size(quotes, 2)
    with pytest.raises(ValueError, match="it holds over 6 strings"):
        check_json_size(quotes + b'"', 2)
    # With the quotes; without escapes.
    check_json_size(b'["ab", "c\\"\\\\"]', 2, 7)
    with pytest.raises(ValueError, match="its strings have 7 bytes; at most 6 are allowed"):
        check_json_size(b'["ab", "c\\"\\\\"]', 2, 6)
    with pytest.raises(ValueError, match="it names something twice"):
        parse_json(b'{"a": 1, "a": 1}', 9)
    assert parse_json(b'\xef\xbb\xbf{"a": 1.5}', 9) == {"a": 1.5}, "a mark of the byte order"


def test_a_json_file_has_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "MAX_JSON_BYTES", 8)
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.json").write_text('{"a": 1} ')
    with pytest.raises(ValueError, match=r"x\.json has more than 8 bytes"):
        read_json_object(tmp_path / "x.json")


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_parts_are_those_of_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched(
        tmp_path, *(f"m-{i}-of-3.gguf" for i in (1, 2, 3)), "n-0002-of-0002.safetensors", "n-0001-of-0002.safetensors"
    )
    parts = tuple(tmp_path / f"m-{i}-of-3.gguf" for i in (1, 2, 3))
    for part in parts:
        assert folder_files(part, "a model") == parts
    assert len(folder_files(tmp_path / "n-0001-of-0002.safetensors", "a model")) == 2
    # What only looks like one of several is a file of its own.
    for name in ("m-4-of-3.gguf", "m-0-of-3.gguf", "m-1-of-1.gguf", "m-1-of-3.bin", "m-1-of-3.gguf.part"):
        assert folder_files(tmp_path / name, "a model") == (tmp_path / name,)
    with pytest.raises(
        ValueError, match=r"one of 6 parts of a model; beside it is no x-2-of-6\.gguf, x-3-of-6\.gguf, x-4-of-6\.gguf$"
    ):
        touched(tmp_path, "x-1-of-6.gguf")
        folder_files(tmp_path / "x-1-of-6.gguf", "a model")
    monkeypatch.setattr(model_folder, "MAX_SHARDS", 3)
    assert folder_files(parts[0], "a model") == parts
    with pytest.raises(ValueError, match=r"x-1-of-6\.gguf is one of 6 files; at most 3 are allowed"):
        folder_files(tmp_path / "x-1-of-6.gguf", "a model")


def test_an_index_names_so_many_files_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "MAX_SHARDS", 2)
    index, longest = tmp_path / "i.json", "x" * 255
    touched(tmp_path, "b", "a", longest)
    for names, words in (
        (["a", "b", longest], "names 3 files; at most 2 are allowed"),
        (["a", "gone"], "names 'gone', which is not a file in"),
        (["gone", "lost"], "names 'gone', which"),
        (["a", 3, "gone"], "names 3, which"),
        (["x" * 256], "names 'x"),
        (["\u00e9" * 128], "names '\u00e9"),
        (["a\n"], r"names 'a\\n', which"),
    ):
        index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        with pytest.raises(ValueError, match=rf"i\.json {words}"):
            shard_files(index)
    for weight_map in ({}, [], None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"i\.json has no weight_map"):
            shard_files(index)
    index.write_text(json.dumps({"weight_map": {"1": "b", "2": "a", "3": "b"}}))
    assert shard_files(index) == (tmp_path / "a", tmp_path / "b")
    index.write_text(json.dumps({"weight_map": {"1": longest}}))
    assert shard_files(index) == (tmp_path / longest,)


VARIANTS = ("", "fp32", "bf16", "fp16", "fp8_e4m3fn", "zero")


@pytest.mark.parametrize("first", range(len(VARIANTS)))
def test_the_most_precise_variant_is_taken(tmp_path: Path, first: int) -> None:
    """Others after those that are known, in order."""
    for variant in reversed(VARIANTS[first:]):
        middle = f".{variant}" if variant else ""
        touched(tmp_path, f"model{middle}.safetensors", f"model{middle}.txt", f"pytorch_model{middle}.bin")
    expected = f"model.{VARIANTS[first]}.safetensors" if VARIANTS[first] else "model.safetensors"
    assert folder_files(tmp_path, "a model") == (tmp_path / expected,)


def test_safetensors_of_any_name_come_before_pickles(tmp_path: Path) -> None:
    names = (
        "pytorch_model.bin",
        "diffusion_pytorch_model.bin",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.zero.safetensors",
    )
    for name in names:
        touched(tmp_path, name)
        assert folder_files(tmp_path, "a model") == (tmp_path / name,)
