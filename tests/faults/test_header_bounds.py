"""Headers, indexes and tokenizers beyond what any release has: refused by the bound's name, before they are parsed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, random_weights, write_official
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.files.gguf_files import MAX_ITEMS, MAX_VALUES, GgufFile
from wan_pack.wan.files.headers import MAX_HEADER_BYTES, MAX_PARTS, MAX_TENSORS, HeadersTogether, read_header
from wan_pack.wan.files.json_text import MAX_DEPTH, check_json_size, parse_json
from wan_pack.wan.files.model_folder import MAX_JSON_BYTES, MAX_SHARDS, folder_files, read_json_object
from wan_pack.wan.files.pth_files import MAX_DIRECTORY_BYTES, MAX_INDEX_BYTES, MAX_OPCODES, read_pth
from wan_pack.wan.files.quant_formats import MAX_TENSOR_PARTS
from wan_pack.wan.files.stored_model import open_model
from wan_pack.wan.text.tokenizer import Tokenizer
from wan_pack.wan.text.tokenizer_bounds import MAX_PIECES, MAX_SPIECE_BYTES, MAX_STRING_BYTES
from wan_pack.wan.text.tokenizer_files import choose_tokenizer_file

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "opening_files.py"
MAX_MIB = 150
"""Of memory, for any file that is opened."""
VOCABULARY_MIB = 1200
"""For a tokenizer.json: most of it is the library's own tree, 300 bytes for each byte of vocabulary."""


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, nbytes: int = 1) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [nbytes], "data_offsets": [start, start + nbytes]}


def refused(open_file: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_file()
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 1000


def test_fault_35_a_safetensors_header_of_too_many_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"note": "x" * MAX_HEADER_BYTES}})
    refused(lambda: read_header(path), str(path), f"a header of {MAX_HEADER_BYTES + 28} bytes", f"{MAX_HEADER_BYTES}")


def test_fault_35_a_safetensors_header_of_too_many_tensors_or_values(tmp_path: Path) -> None:
    count = MAX_TENSORS + 1
    path = write(tmp_path / "x.safetensors", {f"{i}": entry(i) for i in range(count)}, bytes(count))
    refused(lambda: read_header(path), f"describes {count} tensors; at most {MAX_TENSORS} are allowed")
    path = write(tmp_path / "y.safetensors", {"__metadata__": {"x": [0] * MAX_PARTS}})
    refused(lambda: read_header(path), f"over {MAX_PARTS} values")
    path = write(tmp_path / "z.safetensors", b'{"' + b'"' * (5 * MAX_PARTS))
    refused(lambda: read_header(path), "strings")


def test_fault_35_files_that_are_too_much_only_together(tmp_path: Path) -> None:
    note = {"note": "x" * (MAX_HEADER_BYTES // 2)}
    for i in range(2):
        write(tmp_path / f"{i}.safetensors", {"__metadata__": note, f"{i}": entry(0)}, b"\0")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    assert len(open_model(paths[:1], "a model").tensors) == 1
    refused(lambda: open_model(paths, "a model"), str(paths[1]), "for one model")
    refused(lambda: Checkpoint([str(path) for path in paths]), str(paths[1]), "for one model")
    together = HeadersTogether()
    together.add("a", 1, MAX_TENSORS)
    refused(lambda: together.add("b", 1, 1), "b and the files before it", f"{MAX_TENSORS + 1} tensors")


@pytest.mark.parametrize("text", ["[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), '{"a":[' * 9 + "]}" * 9, "[" * 10**6])
def test_fault_35_json_that_nests_too_deep(tmp_path: Path, text: str) -> None:
    refused(lambda: parse_json(text.encode(), MAX_PARTS * 10), f"nest over {MAX_DEPTH} levels deep")
    (tmp_path / "config.json").write_text('{"a": ' + text[: MAX_PARTS // 2] + "}")
    refused(lambda: read_json_object(tmp_path / "config.json"), str(tmp_path), f"nest over {MAX_DEPTH} levels deep")


def test_what_json_strings_hold_is_not_counted() -> None:
    value = {"a": '[{,"' * 1000 + "\\", "b\\": [["\\\\", "]"], {"c": "\u00e9\U0001f98a"}], "n": -1.5e3}
    text = json.dumps(value).encode()
    assert parse_json(text, 12) == value == parse_json(json.dumps(value, ensure_ascii=False).encode(), 12)
    levels = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(levels.encode(), MAX_DEPTH)) == levels
    refused(lambda: check_json_size(text, 3), "over 3 values")
    refused(lambda: check_json_size(text, 12, 100), "at most 100 are allowed")


def test_fault_35_indexes_and_configs(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for i in range(MAX_SHARDS + 1):
        (tmp_path / f"{i}").touch()
    index.write_text(json.dumps({"weight_map": {f"t{i}": f"{i}" for i in range(MAX_SHARDS + 1)}}))
    refused(lambda: folder_files(tmp_path, "a model"), str(index), f"at most {MAX_SHARDS} are allowed")
    for value, words in (({"x": "x" * MAX_JSON_BYTES}, f"{MAX_JSON_BYTES} bytes"), ({"x": [0] * MAX_PARTS}, "values")):
        index.write_text(json.dumps(value))
        refused(lambda: folder_files(tmp_path, "a model"), str(index), words)
    files = [str(path) for path in write_official(tmp_path / "official", random_weights()).glob("*.safetensors")]
    config = tmp_path / "official" / "config.json"
    config.write_text(json.dumps({"_class_name": "WanModel", "num_heads": TINY.num_heads, "x": [0] * MAX_PARTS}))
    refused(lambda: Checkpoint(files), str(config), f"over {MAX_PARTS} values")


def test_fault_35_what_a_layer_says_of_its_format(tmp_path: Path) -> None:
    says = json.dumps({"format": "float8_e4m3fn", "x": [0] * MAX_TENSOR_PARTS}).encode()
    path = write(tmp_path / "x.safetensors", {"a.comfy_quant": entry(0, len(says))}, says)
    refused(lambda: open_model([path], "a model"), str(path), f"over {MAX_TENSOR_PARTS} values")


def gguf(path: Path, *values: bytes, tensors: int = 0, promised: int | None = None) -> Path:
    count = len(values) if promised is None else promised
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(values))
    return path


def listed(key: bytes, type_id: int, count: int, items: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, type_id, count) + items


def test_fault_35_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    refused(lambda: GgufFile(gguf(path, tensors=MAX_TENSORS + 1)), str(path), f"at most {MAX_TENSORS} are allowed")
    refused(lambda: GgufFile(gguf(path, promised=MAX_VALUES + 1)), f"{MAX_VALUES + 1} values; at most {MAX_VALUES}")
    many = MAX_ITEMS + 1
    refused(lambda: GgufFile(gguf(path, listed(b"a", 0, many, bytes(many)))), f"list of {many} values")
    half = listed(b"a", 8, MAX_ITEMS // 2 + 1, bytes(8 * (MAX_ITEMS // 2 + 1)))
    refused(lambda: GgufFile(gguf(path, half, half.replace(b"a", b"b", 1))), f"over {MAX_ITEMS} strings")
    long = b"\1\0\0\0\0\0\0\0a" + struct.pack("<IQ", 8, MAX_HEADER_BYTES) + b"x" * MAX_HEADER_BYTES
    refused(lambda: GgufFile(gguf(path, long)), f"a header's limit of {MAX_HEADER_BYTES} bytes")


def pth(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def test_fault_35_pth(tmp_path: Path) -> None:
    path, stop = tmp_path / "x.pth", b"N."
    entries = {f"{i:06}{'x' * 200}": b"" for i in range(MAX_DIRECTORY_BYTES // 250)}
    refused(lambda: read_pth(pth(path, {"a/data.pkl": stop, **entries})), f"over {MAX_DIRECTORY_BYTES} bytes")
    full = dict(list(entries.items())[: len(entries) // 2])
    most = b"\x80\x02X" + struct.pack("<I", MAX_INDEX_BYTES - 16) + bytes(MAX_INDEX_BYTES - 16) + b"}."
    assert read_pth(pth(path, {"a/data.pkl": most, **full})) == ({}, len(most)), "each has its own bound"
    large = b"\x80\x02X" + struct.pack("<I", MAX_INDEX_BYTES) + b"x" * MAX_INDEX_BYTES + stop
    refused(lambda: read_pth(pth(path, {"a/data.pkl": large})), f"at most {MAX_INDEX_BYTES} are allowed")
    refused(lambda: read_pth(pth(path, {"a/data.pkl": b"N" * MAX_OPCODES + stop})), f"over {MAX_OPCODES} steps")


def test_fault_35_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for value, words in (
        ({"x": "x" * MAX_STRING_BYTES}, f"at most {MAX_STRING_BYTES} are allowed"),
        ({"x": [0] * (4 * MAX_PIECES)}, f"over {4 * MAX_PIECES} values"),
    ):
        path.write_text(json.dumps(value))
        refused(lambda: Tokenizer(path), str(path), words)
    spiece = tmp_path / "spiece.model"
    spiece.write_bytes(bytes(MAX_SPIECE_BYTES + 1))
    for open_file in (lambda: Tokenizer(spiece), lambda: choose_tokenizer_file([spiece], "a model")):
        refused(open_file, str(spiece), f"at most {MAX_SPIECE_BYTES} are allowed")
    spiece.write_bytes(b"\x0a\0" * (MAX_PIECES + 1))
    refused(lambda: Tokenizer(spiece), str(spiece), f"over {MAX_PIECES} pieces")


@pytest.mark.processes
def test_fault_35_the_largest_that_are_opened_take_little_memory() -> None:
    """The benchmark's own files, at the bounds; each row is one that was opened."""
    done = subprocess.run([sys.executable, str(BENCHMARK)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 13
    for name, _, seconds, mib in rows:
        assert float(mib) < (VOCABULARY_MIB if name == "tokenizer json" else MAX_MIB), (name, mib)
        assert float(seconds) < 10, (name, seconds)
