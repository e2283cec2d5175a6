"""One reader for all files: the same tensors from each, headers read once, bytes where the file says."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.files import stored_model
from wan_pack.wan.files.pth_files import interpret, read_pth
from wan_pack.wan.files.stored_model import open_model

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {str(dtype): torch.randn(5, 7, generator=generator).to(dtype) for dtype in DTYPES}


def read(path: Path, name: str, start: int = 0, count: int | None = None) -> Tensor:
    model = open_model([path], "a model")
    stored = model.weights({name: name})[name]
    out = torch.empty(stored.shape if count is None else (count,), dtype=stored.dtype)
    stored.read_into(out, start=start)
    return out


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, suffix: str):
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors(), path)
    assert open_model([path], "a model").shapes == dict.fromkeys(tensors(), (5, 7))
    for name, tensor in tensors().items():
        assert same(read(path, name), tensor), name
        assert same(read(path, name, 9, 20), tensor.view(-1)[9:29]), name


def test_a_pth_may_hold_views_transposed_tensors_and_parameters(tmp_path: Path):
    whole = torch.arange(60.0)
    state = OrderedDict(
        view=whole[10:34].view(4, 6),
        transposed=whole[:35].view(5, 7).t(),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.randn(3, 2)),
        number=torch.tensor(2.5),
        step=7,
        notes={"a": [1, 2, (3, None, True)]},
    )
    state._metadata = {"": {"version": 1}}
    path = tmp_path / "x.pth"
    torch.save(state, path)
    found, _ = read_pth(path)
    assert found.keys() == {"view", "transposed", "channels_last", "parameter", "number"}
    assert [name for name, info in found.items() if info.strides is not None] == ["transposed", "channels_last"]
    loaded = torch.load(path, weights_only=True)
    for name in found:
        assert torch.equal(read(path, name), loaded[name].detach()), name
    assert torch.equal(read(path, "transposed", 3, 10), loaded["transposed"].reshape(-1)[3:13])


def test_what_a_list_of_tensors_does_not_need_is_refused(tmp_path: Path):
    for pickled, words in (
        (b"\x80\x02cposix\nsystem\nU\x01a\x85R.", "SHORT_BINSTRING"),
        (b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00a\x85R.", "calls 'posix system'"),
        (b"\x80\x02}q\x00", "exhausted before seeing STOP"),
        (b"\x80\x02h\x05.", "is damaged"),
        (b"\x80\x02\x85.", "is damaged"),
        (b".", "is damaged"),
    ):
        with pytest.raises(ValueError, match=words):
            interpret(pickled)
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(b"M\xe8\x03\x85", b"M\xe9\x03\x85"))
    with pytest.raises(ValueError, match=r"x\.pth is .*damaged.*tensor 'a' needs 4004 bytes; 4000 are there"):
        read_pth(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="something else than named tensors"):
        read_pth(path)


def test_a_header_is_read_once_and_again_when_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read_headers = []
    original = stored_model.read_header
    monkeypatch.setattr(
        stored_model, "read_header", lambda path, file: read_headers.append(path) or original(path, file)
    )
    path = tmp_path / "x.safetensors"
    save_file(random_weights(), path)
    for _ in range(3):
        with pytest.raises(ValueError, match="without a config"):
            Checkpoint([path])
    assert read_headers == [str(path)]
    save_file({"other": torch.zeros(1)}, path)
    assert list(open_model([path], "a model").tensors) == ["other"]
    os.utime(path, ns=(1, 1))
    open_model([path], "a model")
    assert len(read_headers) == 3
