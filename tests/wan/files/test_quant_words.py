"""What a description of a quantised layer means, word by word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from wan_pack.wan.files.quant_formats import QuantFormat, is_group, placed
from wan_pack.wan.files.stored_model import open_file

INT8, INT4, BLOCKS, NVFP4 = "int8_tensorwise", "convrot_w4a4", "int8_blockwise", "nvfp4"
W4A8 = "asym_w4a8_int8"


def understood(folder: Path, entry: Any) -> QuantFormat:
    says = {"_quantization_metadata": json.dumps({"layers": {"a.q": entry}})}
    save_file({"a.q.weight": torch.zeros(1)}, folder / "m.safetensors", metadata=says)
    formats = open_file(str(folder / "m.safetensors")).formats
    assert list(formats) == ["a.q"]
    return formats["a.q"]


CHANGING = (
    "rot", "hadamard", "group", "block", "param", "zero", "offset", "shift", "smooth", "pack", "perm", "transpos",
    "svd", "low_rank", "codebook", "lut", "bits", "swizzle", "first", "nibble",
)  # fmt: skip
NEUTRAL = (None, False, 0, -1, "", "none", [], {})


@pytest.mark.parametrize("word", CHANGING)
def test_an_option_that_changes_the_values_is_part_of_the_name(tmp_path: Path, word: str) -> None:
    option = f"My_{word.upper()}_x"
    assert understood(tmp_path, {"format": INT8, option: 3}) == QuantFormat(f"{INT8} {option}")


def test_an_option_that_is_off_changes_nothing(tmp_path: Path) -> None:
    off = {f"zero_{i}": value for i, value in enumerate(NEUTRAL)}
    assert understood(tmp_path, {"format": INT8, **off, "per_row": True, "orig_dtype": "x"}) == QuantFormat(INT8)


FORMATS: dict[str, tuple[Any, QuantFormat]] = {
    "a name alone": ("float8_e4m3fn", QuantFormat("float8_e4m3fn")),
    "a name of 64": ("x" * 64, QuantFormat("x" * 64)),
    "options in order": ({"format": INT8, "zero": 1, "group": 2}, QuantFormat(f"{INT8} group zero")),
    "rotated": ({"format": INT8, "convrot": True}, QuantFormat(INT8, 256)),
    "rotated by its own": ({"format": INT8, "convrot": True, "convrot_groupsize": 4}, QuantFormat(INT8, 4)),
    "not rotated": ({"format": INT8, "convrot": False, "convrot_groupsize": 7}, QuantFormat(INT8)),
    "not rotated either": ({"format": INT8, "convrot": None}, QuantFormat(INT8)),
    "int4": ({"format": INT4, "quant_group_size": 64, "bits": 4}, QuantFormat(INT4, 256)),
    "int4, told": ({"format": INT4, "convrot": True, "convrot_groupsize": 16}, QuantFormat(INT4, 16)),
    "int4 of other bits": ({"format": INT4, "bits": 8}, QuantFormat(f"{INT4} bits", 256)),
    "w4a8": ({"format": W4A8}, QuantFormat(W4A8, 256)),
    "w4a8, told": (
        {"format": W4A8, "group_size": 8, "convrot_groupsize": 64, "codebook": True, "bits": 4},
        QuantFormat(W4A8, 64, (8, 8)),
    ),
    "w4a8, told inside": ({"format": W4A8, "params": {"group_size": [1, 32]}}, QuantFormat(W4A8, 256, (1, 32))),
    "w4a8 of 8 bits": ({"format": W4A8, "bits": 8}, QuantFormat(f"{W4A8} bits", 256)),
    "int8 of 8 bits": ({"format": INT8, "num_bits": 8}, QuantFormat(INT8)),
    "int8 of other bits": ({"format": INT8, "num_bits": 4}, QuantFormat(f"{INT8} num_bits")),
    "int8 by int4's groups": ({"format": INT8, "quant_group_size": 64}, QuantFormat(f"{INT8} quant_group_size")),
    "nvfp4 of 4 bits": ({"format": NVFP4, "bits": 4, "group_size": 16}, QuantFormat(NVFP4)),
    "nvfp4 of 8 bits": ({"format": NVFP4, "bits": 8}, QuantFormat(f"{NVFP4} bits")),
    "blocks by one row": ({"format": NVFP4, "block_size": [1, 16]}, QuantFormat(NVFP4)),
    "blocks, not said": ({"format": BLOCKS, "group_size": -1}, QuantFormat(BLOCKS)),
    "square blocks": ({"format": BLOCKS, "group_size": 64}, QuantFormat(BLOCKS, block=(64, 64))),
    "blocks": ({"format": BLOCKS, "block_size": [64, 32]}, QuantFormat(BLOCKS, block=(64, 32))),
    "of one element": ({"format": BLOCKS, "block_size": [1]}, QuantFormat(BLOCKS, block=(1, 1))),
    "twice the same": (
        {"format": BLOCKS, "block_size": [64, 64], "group_size": 64},
        QuantFormat(BLOCKS, block=(64, 64)),
    ),
    "its shape": ({"format": NVFP4, "orig_shape": [3, 4]}, QuantFormat(NVFP4, shape=(3, 4))),
    "no shape": ({"format": NVFP4, "orig_shape": [3, 0]}, QuantFormat(NVFP4)),
    "no numbers": ({"format": NVFP4, "orig_shape": [3, "4"]}, QuantFormat(NVFP4)),
    "no list": ({"format": NVFP4, "orig_shape": "x"}, QuantFormat(NVFP4)),
    "inside": ({"format": INT8, "params": {"convrot": True, "zero": 1}}, QuantFormat(f"{INT8} zero", 256)),
    "the outer one first": (
        {"format": INT8, "convrot": False, "params": {"convrot": True, "format": "x"}},
        QuantFormat(INT8),
    ),
    "params that are none": ({"format": INT8, "params": 3}, QuantFormat(f"{INT8} params")),
}


@pytest.mark.parametrize("case", FORMATS)
def test_a_description_says_a_format(tmp_path: Path, case: str) -> None:
    entry, expected = FORMATS[case]
    assert understood(tmp_path, entry) == expected


POWER = "it must be a power of 4"
SIZES = "it must be a number, or one for rows and one for inputs"
WRONG: dict[str, tuple[Any, str]] = {
    "no name": ({"convrot": True}, r"the format of a\.q is \{'convrot': True\}"),
    "a name that is none": (3, r"the format of a\.q is 3"),
    "a name of 65": ("x" * 65, r"the format of a\.q is 'xxx"),
    "false in words": ({"format": INT8, "convrot": "false"}, r"convrot of a\.q is 'false'; it must be false or true"),
    "w4a8 that is not rotated": ({"format": W4A8, "convrot": False}, r"convrot of a\.q is False; it must be true"),
    "w4a8 of rows": ({"format": W4A8, "group_size": [4, 16]}, rf"group_size of a\.q is \[4, 16\]; {SIZES}"),
    "w4a8 of no size": ({"format": W4A8, "group_size": "8"}, rf"group_size of a\.q is '8'; {SIZES}"),
    "int4 that is not rotated": ({"format": INT4, "convrot": False}, r"convrot of a\.q is False; it must be true"),
    **{
        f"rotated by {group!r}": (
            {"format": INT8, "convrot": True, "convrot_groupsize": group},
            rf"convrot_groupsize of a\.q is {group!r}; {POWER}",
        )
        for group in (0, 1, 2, 8, 20, 128, -4, 16.0, True)
    },
    "blocks of another size": ({"format": NVFP4, "group_size": 32}, r"group_size of a\.q is 32; it is 16 in nvfp4"),
    "mxfp8 of another size": ({"format": "mxfp8", "block_size": 16}, r"block_size of a\.q is 16; it is 32 in mxfp8"),
    "two sizes": ({"format": BLOCKS, "block_size": 64, "group_size": 32}, rf"block_size of a\.q is 64; {SIZES}"),
    **{
        f"blocks of {size!r}": ({"format": BLOCKS, "block_size": size}, rf"block_size of a\.q is .*; {SIZES}")
        for size in (-2, [64, 0], [0, 64], [1, 2, 3], "64", 64.0, True, [64, "64"])
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_a_description_that_says_none_is_refused(tmp_path: Path, case: str) -> None:
    entry, words = WRONG[case]
    with pytest.raises(ValueError, match=rf"m\.safetensors describes its quantisation in an unknown way: {words}"):
        understood(tmp_path, entry)


@pytest.mark.parametrize("says", ["[]", "{}", '{"layers": []}'])
def test_a_header_that_says_it_of_no_layers_is_refused(tmp_path: Path, says: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"_quantization_metadata": says})
    with pytest.raises(ValueError, match="in an unknown way: _quantization_metadata has no layers"):
        open_file(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(("nbytes", "allowed"), [(1024, True), (1025, False)])
def test_a_layer_says_so_much_of_itself(tmp_path: Path, nbytes: int, allowed: bool) -> None:
    """Zeros behind it fill it up."""
    path, text = tmp_path / "m.safetensors", json.dumps({"format": INT8, "x": "y" * 800}).encode()
    save_file({"a.comfy_quant": torch.frombuffer(bytearray(text.ljust(nbytes, b"\0")), dtype=torch.uint8)}, path)
    if allowed:
        assert open_file(str(path)).formats == {"a": QuantFormat(INT8)}
    else:
        with pytest.raises(ValueError, match=r"a\.comfy_quant has 1025 bytes; at most 1024"):
            open_file(str(path))


def test_regular_matrices_are_of_powers_of_four() -> None:
    assert [size for size in range(-4, 5000) if is_group(size)] == [4, 16, 64, 256, 1024, 4096]


ONE, TWO = QuantFormat("one"), QuantFormat("two")
TENSORS = ("m.a.q.weight", "m.b.q.weight", "m.c.weight", "c.weight", "n.c.weight", "other", "d.bias")
PLACED: dict[str, tuple[dict[str, QuantFormat], dict[str, QuantFormat], dict[str, QuantFormat]]] = {
    "by its name": ({"m.a.q": ONE, "m.b.q": TWO}, {"m.a.q.weight": ONE, "m.b.q.weight": TWO}, {}),
    "with more before it": ({"x.y.m.a.q": ONE}, {"m.a.q.weight": ONE}, {}),
    "without what is before it": ({"b.q": ONE}, {"m.b.q.weight": ONE}, {}),
    "of the whole name first": ({"c": ONE}, {"c.weight": ONE}, {}),
    "of several": ({"q": ONE}, {}, {"q.weight": ONE}),
    "of none": ({"z": ONE, "m.a.q": TWO}, {"m.a.q.weight": TWO}, {"z.weight": ONE}),
    "of no weight": ({"d": ONE}, {}, {"d.weight": ONE}),
    "of another model": ({"n.c": ONE}, {}, {}),
}


@pytest.mark.parametrize("case", PLACED)
def test_a_layer_may_be_named_with_more_or_less_before_it(case: str) -> None:
    formats, told, lost = PLACED[case]
    assert placed(formats, TENSORS, TENSORS[:4]) == (told, lost)
