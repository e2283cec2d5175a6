"""GGUF headers byte by byte: every type of value, every bound on what a tensor may say of itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_bytes import F16, F32, NUMBERS, Q8_0, Q8_1, Q8_K, STRING, file, floats, tensor, text, value
from wan_pack.wan.files import gguf_files
from wan_pack.wan.files.gguf_files import GgufFile


def test_values_of_every_type_are_read_and_stepped_over(tmp_path: Path) -> None:
    """In a list of up to 64 and in a longer one, which is read when it is asked for."""
    known = {**{type_id: value for type_id, (_, value) in NUMBERS.items()}, STRING: "caf\u00e9"}
    lists = {(type_id, count): [known[type_id]] * count for type_id in known for count in (64, 65)}
    values = [value(f"one {type_id}", type_id, single) for type_id, single in known.items()]
    values += [value(f"{count} of {type_id}", type_id, *many) for (type_id, count), many in lists.items()]
    opened = GgufFile(file(tmp_path / "x.gguf", [*values, value("last", 4, 7)]))
    assert opened.metadata["last"] == 7
    for type_id, single in known.items():
        found = opened.metadata[f"one {type_id}"]
        assert found == single and type(found) is type(single), type_id
    for (type_id, count), many in lists.items():
        key = f"{count} of {type_id}"
        assert (key in opened.metadata, key in opened.arrays) == (count == 64, count == 65), key
        assert opened.read_array(key) == many, key


def test_a_list_that_is_given_out_is_not_the_files_own(tmp_path: Path) -> None:
    opened = GgufFile(file(tmp_path / "x.gguf", [value("few", 4, 1, 2)]))
    opened.read_array("few").clear()
    assert opened.read_array("few") == [1, 2]


@pytest.mark.parametrize(("version", "allowed"), [(1, False), (2, True), (3, True), (4, False)])
def test_versions_two_and_three_are_read(tmp_path: Path, version: int, allowed: bool) -> None:
    path = file(tmp_path / "x.gguf", [value("a", 4, 1)], version=version)
    if allowed:
        assert GgufFile(path).metadata == {"a": 1}
    else:
        with pytest.raises(ValueError, match=f"it has version {version}; versions 2 and 3"):
            GgufFile(path)


@pytest.mark.parametrize("alignment", [1, 64, 1 << 20])
def test_tensors_begin_at_a_multiple_of_the_alignment(tmp_path: Path, alignment: int) -> None:
    values = [value("general.alignment", 4, alignment)]
    tensors = [tensor("w", F32, (3, 2))]
    opened = GgufFile(file(tmp_path / "x.gguf", values, tensors, floats(1, 2, 3, 4, 5, 6), alignment=alignment))
    assert opened.read_rows("w", 1, 2).tolist() == [[3, 4], [5, 6]]
    assert opened.header_bytes == 24 + len(values[0]) + len(tensors[0])


def test_tensors_may_lie_in_any_order_and_apart(tmp_path: Path) -> None:
    """The last one ends with the file; of one number there is no size."""
    tensors = [tensor("late", F32, (2,), 64), tensor("early", F32, (2,)), tensor("number", F32, (), 32)]
    data = floats(1, 2).ljust(32, b"x") + floats(3).ljust(32, b"x") + floats(4, 5)
    path = file(tmp_path / "x.gguf", (), tensors, data)
    opened = GgufFile(path)
    found = {name: opened.read_flat(name, 0, 1 if name == "number" else 2).tolist() for name in opened.tensors}
    assert found == {"late": [4, 5], "early": [1, 2], "number": [3]}
    assert opened.tensors["number"].shape == ()
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=f"tensor 'late' ends at byte {size}; the file has {size - 1}"):
        GgufFile(path)


def test_a_tensor_has_eight_dimensions_at_most(tmp_path: Path) -> None:
    opened = GgufFile(file(tmp_path / "x.gguf", (), [tensor("w", F32, (2, *(1,) * 7))], floats(1, 2)))
    assert opened.tensors["w"].shape == (2, 1, 1, 1, 1, 1, 1, 1)


W = tensor("w", F32, (2,))
DATA = bytes(1024)
WRONG = {
    "a value of no type": ([text("a") + struct.pack("<I", 13)], [], "it holds a value of type 13, which is no number"),
    "a list of lists": ([text("a") + struct.pack("<IIQ", 9, 9, 1)], [], "it holds a value of type 9, which is no"),
    "a value twice": ([value("a", 4, 1)] * 2, [], "it names 'a' twice"),
    "a long list twice": ([value("a", 0, *range(65))] * 2, [], "it names 'a' twice"),
    "a tensor twice": ([], [W, tensor("w", F32, (2,), 32)], "it names tensor 'w' twice"),
    "nine dimensions": ([], [tensor("w", F32, (1,) * 9)], "tensor 'w' has 9 dimensions; at most 8"),
    "no known type": ([], [tensor("w", 999, (2,))], "tensor 'w' has type 999, which the installed package gguf"),
    "an empty tensor": ([], [tensor("w", F32, (2, 0))], r"tensor 'w' has shape \(2, 0\); F32 has blocks of 1 elem"),
    "part of a block": ([], [tensor("w", Q8_0, (32, 31))], r"shape \(32, 31\); Q8_0 has blocks of 32 elements"),
    "a number of a block": ([], [tensor("w", Q8_0, ())], r"tensor 'w' has shape \(\); Q8_0 has blocks of 32"),
    "one in another": (
        [],
        [tensor("inner", F32, (2,), 4), tensor("outer", F32, (2,))],
        r"tensor 'inner' starts at byte \d+, inside tensor 'outer'",
    ),
    "two in one place": ([], [W, tensor("v", F32, (2,))], r"tensor 'v' starts at byte \d+, inside tensor 'w'"),
    "a shape that is a number": (
        [value("comfy.gguf.orig_shape.w", 4, 2)],
        [W],
        r"orig_shape\.w is 2; it must be a list of sizes",
    ),
    "a shape with a size that is none": (
        [value("comfy.gguf.orig_shape.w", 5, 2, -1)],
        [W],
        r"orig_shape\.w is \[2, -1\]; it must be a list of sizes",
    ),
    "a name that cannot be shown": ([], [tensor("a\nb", F32, (2,))], "holds characters that cannot be shown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    values, tensors, words = WRONG[case]
    with pytest.raises(ValueError, match=rf"x\.gguf is a damaged or truncated GGUF file: .*{words}"):
        GgufFile(file(tmp_path / "x.gguf", values, tensors, DATA))


@pytest.mark.parametrize(("kinds", "first"), [((F16, Q8_K, Q8_1), "Q8_K"), ((Q8_1, F16, Q8_K), "Q8_1")])
def test_the_first_type_that_cannot_be_unpacked_is_named(tmp_path: Path, kinds: Sequence[int], first: str) -> None:
    tensors = [tensor(f"{i}", kind, (256,), 512 * i) for i, kind in enumerate(kinds)]
    with pytest.raises(ValueError, match=f"holds tensors of type {first}, which the package gguf cannot unpack"):
        GgufFile(file(tmp_path / "x.gguf", (), tensors, bytes(2048)))


def test_a_file_that_is_cut_while_its_header_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path / "x.gguf", [value("a", STRING, "word")], alignment=1)
    size = path.stat().st_size
    os.truncate(path, size - 2)
    mode = path.stat().st_mode
    monkeypatch.setattr(gguf_files.os, "fstat", lambda descriptor: SimpleNamespace(st_mode=mode, st_size=size))
    with pytest.raises(ValueError, match=rf"x\.gguf is .*truncated GGUF file: it ended at byte {size - 2} while"):
        GgufFile(path)


def test_a_header_is_read_up_to_its_own_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path / "x.gguf", [value("a", STRING, "word")], [W], floats(1, 2))
    header = GgufFile(path).header_bytes
    monkeypatch.setattr(gguf_files, "MAX_HEADER_BYTES", header)
    assert torch.equal(GgufFile(path).read_rows("w", 0, 2), torch.tensor([1.0, 2.0]))
    monkeypatch.setattr(gguf_files, "MAX_HEADER_BYTES", header - 1)
    with pytest.raises(
        ValueError, match=f"needs 12 bytes at byte {header - 12}, beyond a header's limit of {header - 1}"
    ):
        GgufFile(path)
    os.truncate(path, header - 1)
    with pytest.raises(ValueError, match=f"needs 12 bytes at byte {header - 12}, beyond the file"):
        GgufFile(path)


def test_lists_and_strings_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files, "MAX_ITEMS", 100)
    monkeypatch.setattr(gguf_files, "MAX_VALUES", 3)
    # Strings of all lists together; numbers of each by themselves.
    words, numbers = value("words", STRING, *"ab" * 49), value("numbers", 4, *range(100))
    assert GgufFile(file(tmp_path / "x.gguf", [words, numbers, value("two", STRING, "a", "b")])).metadata["two"] == [
        "a",
        "b",
    ]
    for values, message in (
        ([words, value("three", STRING, "a", "b", "c")], "its lists hold over 100 strings"),
        ([value("many", 4, *range(101))], "it holds a list of 101 values; at most 100 are allowed"),
        ([value(f"{i}", 4, i) for i in range(4)], "it promises 4 values; at most 3 are allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            GgufFile(file(tmp_path / "x.gguf", values))
