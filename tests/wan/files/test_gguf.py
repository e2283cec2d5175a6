"""GGUF files: tensors row by row, metadata, and damage."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from wan_pack.wan.files import gguf_files
from wan_pack.wan.files.gguf_files import GgufFile
from wan_pack.wan.files.stored_model import open_model

Kind = gguf.GGMLQuantizationType


def packed_blocks(kind: Kind, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """[rows, bytes] of random blocks whose scales are ordinary numbers."""
    if kind == Kind.BF16:
        return gguf.quants.quantize(np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32), kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * cols // elements, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes() * 2, dtype=np.uint8)
    # Where each type keeps its float16 scales.
    two = (Kind.Q5_1, Kind.Q4_K, Kind.Q5_K)
    where = slice(size - 2, size) if kind == Kind.Q6_K else slice(0, 4 if kind in two else 2)
    blocks[:, where] = scale[: where.stop - where.start]
    return blocks.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind | None]], **arrays: list) -> Path:
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in arrays.items():
        writer.add_array(key.replace("__", "."), value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.BF16])
def test_any_rows_are_those_of_the_whole_tensor(tmp_path: Path, kind: Kind):
    data = packed_blocks(kind, 700, 512)
    file = GgufFile(write(tmp_path / "t.gguf", {"w": (data, kind)}))
    whole = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    assert file.tensors["w"].shape == (700, 512)
    assert torch.equal(file.read_rows("w", 0, 700), whole)
    assert torch.equal(file.read_rows("w", 333, 41), whole[333:374])
    assert torch.equal(file.read_flat("w", 777, 1000), whole.flatten()[777:1777])
    assert file.read_rows("w", 5, 0).shape == (0, 512)


def test_only_the_blocks_of_the_rows_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rank reads its shard of a file of many GB, with memory for a piece of it."""
    data = packed_blocks(Kind.Q8_0, 64, 96)
    path = write(tmp_path / "t.gguf", {"first": (data, Kind.Q8_0), "w": (data, Kind.Q8_0)})
    file = GgufFile(path)
    read, ranges = gguf_files.read_range, list[tuple[int, int]]()

    def read_range(descriptor: int, into: memoryview, start: int, path: object) -> None:
        ranges.append((start, len(into)))
        read(descriptor, into, start, path)

    monkeypatch.setattr(gguf_files, "read_range", read_range)
    monkeypatch.setattr(gguf_files, "PIECE", 2 * 32 + 31)
    rows = file.read_rows("w", 33, 2)
    assert torch.equal(rows, torch.from_numpy(gguf.quants.dequantize(data, Kind.Q8_0).copy())[33:35])
    # Three blocks of 34 bytes a row.
    begin = file.tensors["w"].offset + 33 * 3 * 34
    assert ranges == [(begin, 68), (begin + 68, 68), (begin + 136, 68)]
    stored = open_model([path], "a model")
    assert stored.read_bytes("w") == data.tobytes() == path.read_bytes()[file.tensors["w"].offset :][: data.nbytes]


def test_original_shapes_are_restored_and_rows_may_start_inside_a_block(tmp_path: Path):
    values = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    packed = gguf.quants.quantize(values.reshape(-1, 256).numpy(), Kind.Q8_0)
    conv = torch.randn(4, 3, 1, 2, 2)
    tensors = {"w": (packed, Kind.Q8_0), "conv": (conv.numpy(), None)}
    file = GgufFile(write(tmp_path / "t.gguf", tensors, comfy__gguf__orig_shape__w=[64, 48]))
    assert file.tensors["w"].shape == (64, 48)
    torch.testing.assert_close(file.read_rows("w", 7, 9), values[7:16], atol=0.02, rtol=0)
    assert torch.equal(file.read_rows("conv", 0, 4), conv)
    with pytest.raises(ValueError, match=r"orig_shape.w is \[64, 49\]; the tensor has 3072 elements"):
        GgufFile(write(tmp_path / "u.gguf", tensors, comfy__gguf__orig_shape__w=[64, 49]))
    for odd in ([64.0, 48.0], [-64, -48], [0, 3072], ["64", "48"], [True, True]):
        with pytest.raises(ValueError, match=r"orig_shape\.w is .*; it must be a list of sizes"):
            GgufFile(write(tmp_path / "u.gguf", tensors, comfy__gguf__orig_shape__w=odd))


def test_metadata_is_kept_if_small_and_read_on_demand_if_long(tmp_path: Path):
    words = [f"word {i} \u00e9" for i in range(1000)]
    arrays = {"tokens": words, "scores": [i / 2 for i in range(300)], "few": [1, 2, 3]}
    file = GgufFile(write(tmp_path / "t.gguf", {"w": (np.zeros((2, 2), np.float32), None)}, **arrays))
    assert file.metadata == {"general.architecture": "wan", "few": [1, 2, 3]}
    assert set(file.arrays) == {"tokens", "scores"}
    assert {name: file.read_array(name) for name in arrays} == arrays


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "t.gguf", {"w": (np.zeros((2, 2), np.float32), None)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"t\.gguf .* pip install gguf"):
        GgufFile(path)


def test_a_type_that_cannot_be_unpacked_is_named(tmp_path: Path):
    path = write(tmp_path / "t.gguf", {"w": (packed_blocks(Kind.Q8_K, 2, 256), Kind.Q8_K)})
    with pytest.raises(ValueError, match=r"t\.gguf holds tensors of type Q8_K"):
        GgufFile(path)


def test_other_and_cut_files_are_named(tmp_path: Path):
    path = write(tmp_path / "t.gguf", {"w": (packed_blocks(Kind.Q8_0, 64, 64), Kind.Q8_0)})
    whole = path.read_bytes()
    for data, words in (
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (whole[:4], "damaged or truncated"),
        (whole[:60], "damaged or truncated"),
        (whole[:-100], r"tensor 'w' ends at byte \d+; the file has"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], "version 50331648"),
        (whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:], "describes 1152921504606846976 tensors"),
        (whole[:24] + struct.pack("<Q", 1 << 62) + whole[32:], "needs 4611686018427387904 bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            GgufFile(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"gone\.gguf cannot be read"):
        GgufFile(tmp_path / "gone.gguf")


def test_a_file_that_shrinks_later_is_an_error_not_garbage(tmp_path: Path):
    path = write(tmp_path / "t.gguf", {"w": (packed_blocks(Kind.Q8_0, 64, 64), Kind.Q8_0)})
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(OSError, match=r"t\.gguf ended at byte"):
        file.read_rows("w", 0, 64)


@pytest.mark.parametrize("value", [True, 32.0, "32", 0, (1 << 20) + 1])
def test_an_alignment_is_a_whole_number(tmp_path: Path, value: object):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "wan")
    add = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string, int: writer.add_uint32}
    add[type(value)]("general.alignment", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=f"general.alignment is {value!r}; it must be a number up to 1048576"):
        GgufFile(tmp_path / "t.gguf")
