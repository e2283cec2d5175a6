"""Safetensors headers: what is read, and what each kind of wrong file is called."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mount import ROOT
from safetensors.torch import save_file
from wan_pack.wan.files.headers import describe_file, read_header
from wan_pack.wan.files.json_text import parse_json
from wan_pack.wan.files.model_folder import folder_files, read_json_object
from wan_pack.wan.files.pth_files import read_pth


def _write(path: Path, header: object, data: bytes = b"", *, raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "fp8": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        "none": torch.zeros(0),
        "number": torch.tensor(1.0),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"who": "test"})
    header = read_header(path)
    assert header.metadata == {"who": "test"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.tensors["fp8"].dtype == "F8_E4M3"
    info = header.tensors["a"]
    data = path.read_bytes()[info.start : info.end]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32).view(2, 3), tensors["a"])


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors (is truncated|is not a safetensors file)"):
        read_header(path)


def test_truncated_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"promises {size} bytes, the file has {size - 8}"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": _entry(dtype="F33")}, "dtype 'F33'"),
        ({"a": _entry(dtype=["F32"])}, "dtype"),
        ({"a": _entry(shape=[-2])}, "shape"),
        ({"a": _entry(shape=[True])}, "shape"),
        # Of as many values as its bytes are, if sizes were multiplied as they are.
        ({"a": _entry(shape=[-1, -2])}, "tensor 'a' has shape [-1, -2]"),
        ({"a": _entry(shape=[2**70])}, "shape"),
        ({"a": _entry(shape=[3])}, "tensor 'a' (F32, shape [3]) takes 12 bytes, but its data_offsets [0, 8] hold 8"),
        ({"a": _entry(shape=2)}, "shape"),
        ({"a": _entry(offsets=[8, 0])}, "data_offsets"),
        ({"a": _entry(offsets=[0])}, "data_offsets"),
        ({"a": _entry(offsets=[0, "8"])}, "data_offsets"),
        ({"a": _entry(offsets=[None, 8])}, "data_offsets"),
        ({"a": _entry(offsets=[-8, 0])}, "data_offsets"),
        ({"a": _entry(offsets=[0, 8.0])}, "data_offsets"),
        ({"a": _entry(), "b": _entry()}, "starts at byte"),
        ({"a": _entry(offsets=[8, 16])}, "starts at byte"),
        ({"a": []}, "not described"),
        ({"a": {"dtype": "F32"}}, "not described"),
        ({"__metadata__": {"a": 1}, "a": _entry()}, "__metadata__"),
        ({"a": _entry(shape=[2**62] * 64)}, "takes"),
        ({"a": _entry(shape=[1] * 65)}, "shape"),
        ({"a": _entry(shape=[10**40])}, "a number of 41 digits"),
        ({"a" * 501: _entry()}, "a tensor name of 501 characters"),
        ({"\ud800": _entry()}, "'\\ud800', which holds characters that cannot be shown"),
        ({"a": _entry(dtype="x" * 10**6)}, "dtype"),
    ],
)
def test_damaged_header(tmp_path: Path, header: object, words: str) -> None:
    path = _write(tmp_path / "x.safetensors", header, bytes(16))
    with pytest.raises(ValueError, match=r"x\.safetensors has a damaged safetensors header") as caught:
        read_header(path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


@pytest.mark.parametrize("raw", [b'{"a": ', b'{"a"' + b":[" * 100_000, b"{\xff}", b'{"a": 1, "a": 2}'])
def test_header_that_is_no_json(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(ValueError, match="damaged safetensors header"):
        read_header(_write(tmp_path / "x.safetensors", None, raw=raw))


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="promises"):
        read_header(_write(tmp_path / "x.safetensors", {"a": _entry()}, bytes(9)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"\x80\x02}q\x00." + bytes(10), "a Python pickle"),
        (b"\x80\x05}\x94." + bytes(10), "a Python pickle"),
        (b"\x80\x01}q\x00." + bytes(10), "of an unknown format"),
        (b'{"error": "not found"}', "a JSON file"),
        (bytes(1000), "a file of zero bytes"),
        (b"what is this then, I wonder", "of an unknown format"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file: it is") as caught:
        read_header(path)
    assert words in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_header(path)


def test_pth_names_without_unpickling(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"some.weight": torch.zeros(2)}, path)
    tensors, _ = read_pth(path)
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == {"some.weight": ("F32", (2,))}
    # As trainers put it beside their steps.
    for named in ("state_dict", "model"):
        torch.save({"step": 3, named: {"some.weight": torch.zeros(2)}, "rates": {"first": 0.1}}, path)
        assert {name: info.shape for name, info in read_pth(path)[0].items()} == {"some.weight": (2,)}
    torch.save({"model": {"some.weight": torch.zeros(2)}, "ema": {"some.weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"several lists of tensors \('model', 'ema'\); save one of them by itself"):
        read_pth(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"x\.pth is a truncated or damaged PyTorch checkpoint"):
        read_pth(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"x\.pth is not a PyTorch checkpoint: it is a web page"):
        read_pth(path)


def test_folders_of_diffusers_and_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder that holds none of .*; expected a model"):
        folder_files(tmp_path, "a model")
    assert folder_files(tmp_path / "file.gguf", "a model") == (tmp_path / "file.gguf",)
    # The last one written is preferred to all before it.
    for name, index in (
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ("model.fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("model.safetensors", "model.safetensors.index.json"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ):
        shards = [f"{name}-{i}" for i in (2, 1)]
        for shard in shards:
            (tmp_path / shard).touch()
        (tmp_path / index).write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}))
        assert [path.name for path in folder_files(tmp_path, "a model")] == shards[::-1]
        (tmp_path / name).touch()
        assert folder_files(tmp_path, "a model") == (tmp_path / name,)


@pytest.mark.parametrize("value", ["../x", "/etc/passwd", "gone.safetensors", "", ".", "a\0b", "x" * 5000, 3, None])
def test_an_index_names_only_files_beside_it(tmp_path: Path, value: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": value}}))
    with pytest.raises(ValueError, match=r"index\.json names .* which is not a file in") as caught:
        folder_files(tmp_path, "a model")
    assert len(str(caught.value)) < 1000


@pytest.mark.processes
def test_checks_need_only_the_standard_library() -> None:
    code = (
        "import sys, types; pack = types.ModuleType('p'); pack.__path__ = [sys.argv[1]]; sys.modules['p'] = pack\n"
        "import p.wan.files.headers, p.wan.vae.vae_keys, p.wan.text.t5_keys, p.wan.text.tokenizer_files\n"
        "import p.wan.files.model_folder\n"
        "assert not {'torch', 'numpy', 'safetensors', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, timeout=60)


@pytest.mark.parametrize(("digits", "allowed"), [(30, True), (31, False)])
def test_a_number_has_at_most_thirty_digits(digits: int, allowed: bool) -> None:
    text = f'{{"a": {"1" * digits}}}'.encode()
    if allowed:
        assert parse_json(text, 9) == {"a": int("1" * digits)}
    else:
        with pytest.raises(ValueError, match="a number of 31 digits; at most 30 are allowed"):
            parse_json(text, 9)


@pytest.mark.parametrize("header", [[], "text", 3, None])
def test_a_header_that_is_no_object_is_another_format(tmp_path: Path, header: object) -> None:
    path = _write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_header(path)


def test_notes_that_are_null_are_none(tmp_path: Path) -> None:
    assert read_header(_write(tmp_path / "x.safetensors", {"__metadata__": None})).metadata == {}


def test_what_a_path_turns_out_to_be(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "whole")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    found = {name: describe_file(tmp_path / name) for name in ("whole", "folder", "pipe", "gone")}
    assert found["whole"] == "a safetensors file" and found["folder"] == "a folder"
    assert found["pipe"] == "unreadable (it is not a regular file)"
    assert found["gone"] == "unreadable (No such file or directory)"


def test_configs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name, words in (("gone.json", "cannot be read: No such file"), (".", "cannot be read: it is not a regular")):
        with pytest.raises(ValueError, match=words):
            read_json_object(tmp_path / name)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_json_object(tmp_path / "x.json")
