"""What a .pth's list of tensors may say: each storage by its dtype, each tensor by its place."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.wan.files import pth_files
from wan_pack.wan.files.pth_files import interpret, read_pth

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def changed(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """The archive with files renamed, changed or left out."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            if (kept := change(name, data)) is not None:
                archive.writestr(*kept)
    return path


def bytes_of(path: Path, start: int, end: int) -> bytes:
    return path.read_bytes()[start:end]


def test_every_dtype_is_named_and_placed(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    given = {
        name: torch.arange(6).to(torch.uint8).repeat(dtype.itemsize).view(dtype)[None] for name, dtype in DTYPES.items()
    }
    torch.save(given, path)
    found, nbytes = read_pth(path)
    for name, tensor in given.items():
        info = found[name]
        assert (info.dtype, info.shape, info.strides) == (name, (1, 6), None)
        assert bytes_of(path, info.start, info.end) == bytes(tensor.view(torch.uint8).flatten().tolist()), name
    with zipfile.ZipFile(path) as archive:
        (index,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
    assert nbytes == index.file_size


PLACED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int], tuple[int, ...] | None]] = {
    "whole": (lambda t: t, (0, 24), None),
    "the last rows": (lambda t: t[2:], (8, 24), None),
    "one column": (lambda t: t[:, 1:2], (1, 22), (4, 1)),
    "one row": (lambda t: t[3:4], (12, 16), None),
    "one row, however far the next": (lambda t: t.as_strided((1, 4), (9, 1), 4), (4, 8), None),
    "turned": (lambda t: t.t(), (0, 24), (1, 4)),
    "turned, of one row": (lambda t: t[1:2].t(), (4, 8), None),
    "one value many times": (lambda t: t[1, 1].expand(3, 2), (5, 6), (0, 0)),
    "one value": (lambda t: t[1, 1], (5, 6), None),
    "none": (lambda t: t[2:2], (8, 8), None),
    "every other row": (lambda t: t[::2], (0, 20), (8, 1)),
    "three sizes": (lambda t: t.view(2, 3, 4), (0, 24), None),
    "the middle of three": (lambda t: t.view(2, 3, 4)[:, :2], (0, 20), (12, 4, 1)),
}


@pytest.mark.parametrize("case", PLACED)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_a_tensor_is_placed_by_its_offset_and_strides(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    make, (begin, end), strides = PLACED[case]
    whole = torch.arange(24, dtype=dtype).view(6, 4)
    torch.save({"all": whole, "part": make(whole)}, tmp_path / "x.pth")
    found, _ = read_pth(tmp_path / "x.pth")
    start, size = found["all"].start, dtype.itemsize
    assert found["all"].end - start == 24 * size
    part = found["part"]
    assert (part.start - start, part.end - start) == (begin * size, end * size)
    assert (part.shape, part.strides) == (tuple(make(whole).shape), strides)


def test_bytes_that_are_missing_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "x.pth")
    changed(tmp_path / "x.pth", lambda name, data: None if name.endswith("data/1") else (name, data))
    with pytest.raises(ValueError, match=r"damaged PyTorch checkpoint: the bytes of tensor 'b' are missing"):
        read_pth(tmp_path / "x.pth")


def test_the_list_lies_in_the_one_folder(tmp_path: Path) -> None:
    """Of any name; deeper or beside it is something else."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.tensor([2, 3], dtype=torch.uint8)}, path)
    changed(path, lambda name, data: (f"my model/{name.partition('/')[2]}", data))
    (info,) = read_pth(path)[0].values()
    assert bytes_of(path, info.start, info.end) == b"\2\3"
    for folder in ("deeper/my model/", ""):
        torch.save({"a": torch.zeros(2)}, path)
        changed(path, lambda name, data, folder=folder: (f"{folder}{name.partition('/')[2]}", data))
        with pytest.raises(ValueError, match=r"a zip archive without a plain data\.pkl"):
            read_pth(path)


def test_an_archive_without_a_byte_order_is_of_the_usual_one(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    changed(tmp_path / "x.pth", lambda name, data: None if name.endswith("byteorder") else (name, data))
    assert list(read_pth(tmp_path / "x.pth")[0]) == ["a"]


def test_a_list_takes_so_many_steps_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pth_files, "MAX_OPCODES", 3)
    assert interpret(b"NN.") is None
    with pytest.raises(ValueError, match="its list of tensors takes over 3 steps to build"):
        interpret(b"NNN.")


def word(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


FLOATS = b"(" + word(b"storage") + b"ctorch\nFloatStorage\n" + word(b"0") + word(b"cpu") + b"K\1tQ"
"""A storage, by its identity."""
ARGUMENTS = b"K\0K\1\x85K\1\x85\x89}"
"""Offset, sizes, strides, and what no tensor's place depends on."""


def made(function: bytes, arguments: bytes) -> bytes:
    return b"c" + function + b"\n(" + arguments + b"tR."


def test_one_tensor_is_built_of_steps() -> None:
    tensor = interpret(made(b"torch._utils\n_rebuild_tensor_v2", FLOATS + ARGUMENTS))
    assert (tensor.dtype, tensor.offset, tensor.shape, tensor.strides) == ("F32", 0, (1,), (1,))
    other = interpret(made(b"torch._utils\n_rebuild_tensor_v3", FLOATS + ARGUMENTS + b"ctorch\nfloat8_e5m2\n"))
    assert other.dtype == "F8_E5M2"
    # Which only the third form says of itself.
    again = interpret(made(b"torch._utils\n_rebuild_tensor_v2", FLOATS + ARGUMENTS + b"ctorch\nfloat8_e5m2\n"))
    assert again.dtype == "F32"


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (FLOATS.replace(b"storage", b"module_") + b".", "refers to something else than a storage"),
        (FLOATS.replace(b"ctorch\nFloatStorage\n", word(b"a")) + b".", "refers to something else than a storage"),
        (FLOATS.replace(word(b"0"), b"K\0") + b".", "refers to something else than a storage"),
        (b"NQ.", "is damaged"),
        (made(b"torch._utils\n_rebuild_tensor_v2", b"K\0" + ARGUMENTS), "a tensor of an unknown dtype"),
        (
            made(b"torch._utils\n_rebuild_tensor_v2", FLOATS.replace(b"FloatStorage", b"QInt8Storage") + ARGUMENTS),
            "a tensor of an unknown dtype",
        ),
        (
            made(b"torch._utils\n_rebuild_tensor_v3", FLOATS + ARGUMENTS + b"ctorch\nfloat4\n"),
            "a tensor of an unknown dtype",
        ),
        (made(b"torch._utils\n_rebuild_tensor_v1", FLOATS + ARGUMENTS), "calls 'torch._utils _rebuild_tensor_v1'"),
        (b"K\1K\2R.", "calls '', which no list of tensors needs"),
        (b"}(" + word(b"a") + b"u.", "is damaged"),
        (b"\x86.", "is damaged"),
        (b"N\x86.", "is damaged"),
        (b"t.", "is damaged"),
        (b"h\1.", "is damaged"),
        (b"b.", "is damaged"),
        (b"cos\nsystem\n)\x81.", "calls 'os system'"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_tensors_is_refused(pickled: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interpret(pickled)


ONE = word(b"a")
BUILT: dict[str, tuple[bytes, Any]] = {
    "one item": (b"}" + ONE + b"K\7s.", {"a": 7}),
    "many items": (b"}(" + ONE + b"K\7" + word(b"b") + b"Nu.", {"a": 7, "b": None}),
    "keys that are no text": (b"}(K\1K\2" + ONE + b"K\7u.", {"a": 7}),
    "a list's items": (b"]K\1a.", []),
    "a list's many items": (b"](K\1K\2e.", []),
    "items of a list are none of a dictionary": (b"](K\1K\2u.", []),
    "tuples": (b"K\1K\2K\3\x87.", (1, 2, 3)),
    "a pair": (b"NK\1K\2\x86.", (1, 2)),
    "marked": (b"(K\1K\2t.", (1, 2)),
    "kept": (b"K\5q\3K\6h\3\x86.", (6, 5)),
    "kept far": (b"K\5r\3\0\0\0K\6j\3\0\0\0\x86.", (6, 5)),
    "kept in order": (b"K\5\x94K\6\x94h\0h\1\x87.", (6, 5, 6)),
    "truth": (b"\x88\x89N\x87.", (True, False, None)),
    "a dictionary that is called for": (b"ccollections\nOrderedDict\n)R" + ONE + b"K\7s.", {"a": 7}),
    "state that is set": (b"}" + ONE + b"K\7s}b.", {"a": 7}),
    "a module's name in parts": (word(b"collections") + word(b"OrderedDict") + b"\x93)R.", {}),
    "a parameter": (b"ctorch._utils\n_rebuild_parameter\n(K\7\x88}tR.", 7),
}


@pytest.mark.parametrize("case", BUILT)
def test_what_steps_build(case: str) -> None:
    pickled, value = BUILT[case]
    built = interpret(b"\x80\2" + pickled)
    assert built == value and type(built) is type(value)


def test_a_file_that_cannot_be_read_is_named_once_with_the_reason(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone.pth", "No such file or directory"), (tmp_path, "it is not a regular file")):
        with pytest.raises(ValueError) as caught:
            read_pth(path)
        assert str(caught.value) == f"{path} cannot be read: {reason}"
