"""Which scales fit which codes, by their shapes and what is said of them; what is read of a file at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_pack.wan.files import stored_tensor
from wan_pack.wan.files.block_scaled import BlockScaled, tiled_size
from wan_pack.wan.files.quant_formats import QuantFormat
from wan_pack.wan.files.quantised import is_unused, pair_scales
from wan_pack.wan.files.rotated import Rotated
from wan_pack.wan.files.stored_model import open_model
from wan_pack.wan.files.stored_tensor import PackedTensor, PlainTensor, RowScale, StoredTensor

E4M3, E5M2, INT8, UINT8, F32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.float32
W = "a.weight"
Shape = tuple[int, ...]


def plain(dtype: torch.dtype, *shape: int) -> PlainTensor:
    return PlainTensor("m.safetensors", dtype, shape, 0)


def paired(
    codes: PlainTensor, scale: PlainTensor, kind: QuantFormat | None = None, **more: StoredTensor
) -> dict[str, StoredTensor]:
    named = {f"a.{name}": tensor for name, tensor in more.items()}
    return pair_scales({W: codes, "a.weight_scale": scale, **named}, {W: kind} if kind else None)


ROWS: list[tuple[Shape, Shape]] = [
    ((96, 80), ()), ((96, 80), (1,)), ((96, 80), (1, 1)), ((96, 80), (96,)), ((96, 80), (96, 1)),
    ((96, 80), (96, 1, 1)), ((96,), (96,)), ((96, 2, 2), ()), ((1, 80), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "scales"), ROWS)
@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_one_number_or_one_for_each_row(dtype: torch.dtype, shape: Shape, scales: Shape) -> None:
    found = paired(plain(dtype, *shape), plain(F32, *scales))
    weight, scale = found[W], found[f"{W}_scale"]
    assert isinstance(weight, PlainTensor) and weight.scale is scale and list(found) == [W, f"{W}_scale"]
    assert isinstance(scale, RowScale) and scale.shape == (shape[0], 1)


def of_blocks(name: str, *block: int) -> QuantFormat:
    return QuantFormat(name, block=(block[0], block[1]) if block else None)


I8 = "int8_blockwise"
BLOCKS: list[tuple[Shape, Shape, QuantFormat | None, tuple[int, int]]] = [
    # A power of two, where one covers the size in so many; else equal parts.
    ((256, 384), (2, 3), None, (128, 128)),
    ((200, 300), (2, 3), None, (128, 128)),
    ((129, 257), (3, 5), None, (64, 64)),
    ((100, 100), (5, 10), None, (20, 10)),
    ((100, 100), (7, 4), None, (16, 32)),
    ((8, 8), (8, 8), None, (1, 1)),
    ((8, 6), (1, 3), None, (8, 2)),
    ((8, 6), (1, 6), None, (8, 1)),
    # Of 128 rows each, the usual number.
    ((256, 80), (2,), None, (128, 80)),
    ((256, 80), (2, 1), None, (128, 80)),
    ((200, 80), (2,), None, (128, 80)),
    # As is said.
    ((100, 100), (2, 4), of_blocks(I8, 64, 32), (64, 32)),
    ((100, 100), (100, 4), of_blocks(I8, 64, 32), (1, 32)),
    ((100, 100), (2, 100), of_blocks(I8, 64, 32), (64, 1)),
    ((100, 100), (1, 1), of_blocks(I8, 100, 101), (100, 100)),
    ((96, 80), (3,), of_blocks(I8, 32, 80), (32, 80)),
    ((96, 80), (3, 2), of_blocks(I8), (32, 64)),
]


@pytest.mark.parametrize(("shape", "scales", "kind", "block"), BLOCKS)
def test_a_number_for_each_block(shape: Shape, scales: Shape, kind: QuantFormat | None, block: tuple[int, int]) -> None:
    found = paired(plain(INT8, *shape), plain(F32, *scales), kind)
    if block[1] == shape[1] and block[0] in (1, shape[0]):
        assert isinstance(found[W], PlainTensor), "as one for each row, or for all"
        return
    weight = found[W]
    assert isinstance(weight, BlockScaled) and list(found) == [W]
    assert (weight.block, weight.tiled, weight.int4, weight.factor) == (block, False, False, None)
    assert weight.shape == shape


NVFP4, MXFP8, INT4 = QuantFormat("nvfp4"), QuantFormat("mxfp8"), QuantFormat("convrot_w4a4", 16)


@pytest.mark.parametrize(
    ("rows", "number", "tiled"),
    [(128, 1024, True), (64, 1024, True), (64, 512, False), (130, 2048, True), (130, 1040, False)],
)
@pytest.mark.parametrize("said", [False, True])
def test_scales_in_tiles_or_in_rows(rows: int, number: int, tiled: bool, said: bool) -> None:
    """Of eight blocks of inputs: two tiles of four side by side."""
    assert tiled_size(rows, 8) == -(-rows // 128) * 1024
    four = paired(plain(UINT8, rows, 64), plain(E4M3, number), NVFP4 if said else None, weight_scale_2=plain(F32))[W]
    eight = paired(plain(E4M3, rows, 256), plain(UINT8, number), MXFP8 if said else None)[W]
    assert isinstance(four, BlockScaled) and isinstance(eight, BlockScaled)
    assert (four.block, four.tiled, four.shape, eight.block, eight.tiled, eight.shape) == (
        (1, 16), tiled, (rows, 128), (1, 32), tiled, (rows, 256)
    )  # fmt: skip
    assert four.factor == plain(F32) and eight.factor is None
    assert {tiled_size(1, 1), tiled_size(128, 4)} == {512} and tiled_size(129, 5) == 2048


def test_scales_as_bytes_are_what_is_said() -> None:
    found = paired(plain(UINT8, 64, 64), plain(UINT8, 512), NVFP4, weight_scale_2=plain(F32, 1))[W]
    assert isinstance(found, BlockScaled) and found.scales.dtype == E4M3
    for name, dtype in (("float8_e4m3fn", E4M3), ("float8_e5m2_rowwise", E5M2), ("float8_e4m3fn_rowwise", E4M3)):
        weight = paired(plain(UINT8, 64, 64), plain(F32), QuantFormat(name))[W]
        assert isinstance(weight, PlainTensor) and weight.dtype == dtype


def test_int4_is_two_in_a_byte_and_rotated() -> None:
    for scales in ((32,), (32, 1)):
        found = paired(plain(INT8, 32, 24), plain(F32, *scales), INT4)[W]
        assert isinstance(found, Rotated) and found.group == 16 and isinstance(found.stored, BlockScaled)
        assert (found.stored.block, found.stored.int4, found.stored.tiled) == ((1, 48), True, False)
        assert found.shape == (32, 48) and found.stored.stored.dtype == UINT8


SCALE = r"the scale of tensor a\.weight has shape"
CODES = "but it has no such codes and scales"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no power and no equal parts": ({"codes": plain(INT8, 100, 100), "scale": plain(F32, 6, 10)}, SCALE),
    "none at all": ({"codes": plain(INT8, 8, 8), "scale": plain(F32, 0, 8)}, SCALE),
    "no equal columns": ({"codes": plain(INT8, 100, 100), "scale": plain(F32, 5, 6)}, SCALE),
    "too few rows in one column": ({"codes": plain(INT8, 96, 80), "scale": plain(F32, 3)}, SCALE),
    "other blocks than said": (
        {"codes": plain(INT8, 100, 100), "scale": plain(F32, 2, 2), "kind": of_blocks(I8, 64, 32)},
        rf"{SCALE} \(2, 2\); expected one number, .* 100 rows, .* each block of 64 x 32 of the weight's 100 x 100;",
    ),
    "three sizes": ({"codes": plain(INT8, 8, 8), "scale": plain(F32, 2, 2, 2)}, SCALE),
    "a weight of three": ({"codes": plain(INT8, 8, 8, 1), "scale": plain(F32, 2, 2)}, SCALE),
    "whole numbers": ({"codes": plain(INT8, 8, 8), "scale": plain(INT8, 4, 4)}, SCALE),
    "nvfp4 of no whole blocks": (
        {"codes": plain(UINT8, 8, 12), "scale": plain(E4M3, 8), "weight_scale_2": plain(F32)},
        SCALE,
    ),
    "nvfp4 of other scales": (
        {"codes": plain(UINT8, 8, 16), "scale": plain(E5M2, 512), "weight_scale_2": plain(F32)},
        SCALE,
    ),
    "nvfp4 of too few": (
        {"codes": plain(UINT8, 8, 16), "scale": plain(E4M3, 511), "weight_scale_2": plain(F32)},
        SCALE,
    ),
    "nvfp4 without its one number": ({"codes": plain(UINT8, 8, 16), "scale": plain(E4M3, 512)}, SCALE),
    "nvfp4 of two": ({"codes": plain(UINT8, 8, 16), "scale": plain(E4M3, 512), "weight_scale_2": plain(F32, 2)}, SCALE),
    "nvfp4 of a whole one": (
        {"codes": plain(UINT8, 8, 16), "scale": plain(E4M3, 512), "weight_scale_2": plain(INT8)},
        SCALE,
    ),
    "nvfp4 of a packed one": (
        {"codes": plain(UINT8, 8, 16), "scale": plain(E4M3, 512), "weight_scale_2": PackedTensor(None, "x")},
        SCALE,
    ),
    "mxfp8 with one number": (
        {"codes": plain(E4M3, 8, 32), "scale": plain(UINT8, 512), "weight_scale_2": plain(F32)},
        SCALE,
    ),
    "mxfp8 of no whole blocks": ({"codes": plain(E4M3, 8, 48), "scale": plain(UINT8, 512)}, SCALE),
    "mxfp8 without inputs": ({"codes": plain(E4M3, 8, 0), "scale": plain(UINT8, 512)}, SCALE),
    "said to be nvfp4": ({"codes": plain(INT8, 8, 32), "scale": plain(F32), "kind": NVFP4}, f"be nvfp4, {CODES}"),
    "said to be none": (
        {"codes": plain(E4M3, 8, 32), "scale": plain(UINT8, 512), "kind": QuantFormat("float8_e4m3fn")},
        f"is said to be float8_e4m3fn, {CODES}",
    ),
    "int4 of three sizes": ({"codes": plain(INT8, 8, 8, 1), "scale": plain(F32, 8), "kind": INT4}, SCALE),
    "int4 in two bytes": ({"codes": plain(torch.float16, 8, 8), "scale": plain(F32, 8), "kind": INT4}, SCALE),
    "int4 of one scale": ({"codes": plain(INT8, 8, 8), "scale": plain(F32, 1), "kind": INT4}, SCALE),
    "int4 of whole scales": ({"codes": plain(INT8, 8, 8), "scale": plain(INT8, 8), "kind": INT4}, SCALE),
    "int4 of no whole groups": (
        {"codes": plain(INT8, 8, 12), "scale": plain(F32, 8), "kind": INT4},
        r"tensor a\.weight of shape \(8, 24\) is said to be rotated by groups of 16 inputs",
    ),
    "rows rotated of three sizes": (
        {"codes": plain(INT8, 8, 16, 1), "scale": plain(F32, 8), "kind": QuantFormat("int8_tensorwise", 16)},
        r"tensor a\.weight of shape \(8, 16, 1\) is said to be rotated",
    ),
    "a number": ({"codes": plain(E4M3), "scale": plain(F32)}, "a scale for tensor a.weight, but no such weight"),
    "twice": ({"codes": plain(INT8, 8, 8), "scale": plain(F32), "scale_weight": plain(F32)}, "a.weight has two scales"),
    "its number twice": (
        {"codes": plain(UINT8, 8, 16), "scale": plain(E4M3, 512)}
        | dict.fromkeys(("weight_scale_2", "scale_weight_2"), plain(F32)),
        "a.weight has two scales",
    ),
    "rows of whole scales": (
        {"codes": plain(INT8, 8, 8), "scale": plain(INT8)},
        r"the scale of tensor a\.weight is of torch\.int8; expected a float dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_scales_that_fit_nothing_are_refused(case: str) -> None:
    given, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        paired(**given)


def test_codes_by_themselves_are_refused_but_for_marks() -> None:
    for dtype, words in ((INT8, "tensor a.weight is int8 without a scale"), (UINT8, "a packed format of 8 bits or")):
        with pytest.raises(ValueError, match=words):
            pair_scales({W: plain(dtype, 2)})
        assert list(pair_scales({W: plain(dtype, 1)})) == [W]
    for kind in (NVFP4, QuantFormat("int8_blockwise"), QuantFormat("int8_tensorwise", 16), INT4):
        with pytest.raises(ValueError, match=rf"a\.weight is said to be {kind.name}, {CODES}"):
            pair_scales({W: plain(E4M3, 8, 16)}, {W: kind})


@pytest.mark.parametrize(("rows", "columns", "step"), [(20, 40, 16), (20, 70, 32), (100, 100, 128), (17, 16, 128)])
def test_padding_is_told_by_the_shape_or_the_bias(rows: int, columns: int, step: int) -> None:
    """Rows and inputs are filled up to multiples of one number."""
    whole = tuple(-(-size // step) * step for size in (rows, columns))
    codes = plain(UINT8, whole[0], whole[1] // 2)
    given = {"scale": plain(E4M3, tiled_size(whole[0], whole[1] // 16)), "weight_scale_2": plain(F32)}
    said = paired(codes, kind=QuantFormat("nvfp4", shape=(rows, columns)), **given)[W]
    assert said.shape == (rows, columns)
    for shape in ((rows, columns, 1), (rows + step, columns)):
        assert paired(codes, kind=QuantFormat("nvfp4", shape=shape), **given)[W].shape == whole
    by_bias = paired(codes, bias=plain(F32, rows), **given)[W]
    assert by_bias.shape == (rows, whole[1])
    for other in ((rows, 1), (whole[0],), (whole[0] + 1,)):
        assert paired(codes, bias=plain(F32, *other), **given)[W].shape == whole


def test_what_only_describes_is_no_weight() -> None:
    unused = ("scaled_fp8", "a.scale_input", "a.input_scale", "a.output_scale", "a.comfy_quant")
    assert all(map(is_unused, unused))
    assert not any(map(is_unused, ("a.scaled_fp8", "a.weight", "a.weight_scale", "comfy_quant.weight")))


@pytest.mark.parametrize(
    ("staging", "piece", "reads"),
    [(100, 1000, [96, 24]), (1000, 70, [64, 56]), (1000, 60, [60, 60]), (8, 1, [8] * 15), (1000, 1000, [120])],
)
def test_scaled_rows_are_read_as_many_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: int, piece: int, reads: list[int]
) -> None:
    """Into the buffer, and as floats."""
    width = 60 if reads == [60, 60] else 8
    codes, scale = torch.randint(-9, 9, (120 // width, width)).to(INT8), torch.rand(120 // width, 1) + 1
    save_file({W: codes, "a.weight_scale": scale}, tmp_path / "m.safetensors")
    tensor = open_model([tmp_path / "m.safetensors"], "a model").weights({n: n for n in (W, "a.weight_scale")})[W]
    monkeypatch.setattr(stored_tensor, "FLOAT_PIECE", piece)
    done, read = [], stored_tensor.read_range

    def read_range(descriptor: int, out: memoryview, offset: int, path: str) -> None:
        done.append(len(out))
        read(descriptor, out, offset, path)

    monkeypatch.setattr(stored_tensor, "read_range", read_range)
    out = torch.empty(codes.shape)
    tensor.read_into(out, staging=torch.empty(staging, dtype=UINT8))
    assert torch.equal(out, codes.float() * scale)
    # After each read of codes one of their scales.
    assert done[::2] == reads and done[1::2] == [4 * count // width for count in reads]
