"""One reader for all files: the same tensors from each, headers read once, bytes where the file says."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_formats import write_gguf
from safetensors.torch import save_file
from tiny import random_weights
from torch import Tensor
from wan_pack.wan.checkpoint.checkpoint import Checkpoint
from wan_pack.wan.files import regular_files, stored_model, stored_tensor
from wan_pack.wan.files.headers import DTYPE_BITS, read_header
from wan_pack.wan.files.module_weights import fill
from wan_pack.wan.files.pth_files import _Global, _made, _storage, interpret, read_pth
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
        (b"\x80\x02}(X\x01\x00\x00\x00au.", "is damaged"),
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


def test_one_compressed_part_makes_it_no_checkpoint(tmp_path: Path):
    """Each is stored as it is: no archive makes more of it than the file has bytes."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for compressed in parts:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
                archive.writestr(name, data, compress_type=kind)
        with pytest.raises(ValueError, match=r"a zip archive without a plain data\.pkl"):
            read_pth(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_values_of_every_kind_may_stand_beside_tensors(tmp_path: Path, protocol: int):
    more = {"loss": 0.25, "step": 3, "many": 70_000, "most": 2**40, "less": -5, "name": "x" * 300, "pair": (1, 2.5)}
    # Protocol 2 has sets called for, which nothing may be.
    more |= {"\u00e9": "caf\u00e9", "no": None} | ({"set": {1, 2}} if protocol == 4 else {})
    torch.save({"a": torch.ones(2), **more}, tmp_path / "x.pth", pickle_protocol=protocol)
    assert read_pth(tmp_path / "x.pth")[0].keys() == {"a"}


def test_a_list_of_more_things_than_a_byte_counts(tmp_path: Path):
    state = {f"{i}": torch.full((2,), float(i)) for i in range(200)}
    state |= {"half": torch.ones(2).half(), "halves": torch.tensor([2.0, 3.0]).half()}
    torch.save(state, tmp_path / "x.pth")
    for name, tensor in state.items():
        assert torch.equal(read(tmp_path / "x.pth", name), tensor), name


@pytest.mark.parametrize("wrong", [-1, 2**63, 1.0, True])
@pytest.mark.parametrize("place", ["offset", "size", "stride"])
def test_sizes_that_are_none(wrong: object, place: str):
    storage = _storage(("storage", _Global("torch FloatStorage"), "0", "cpu", 1))
    given = {"offset": 0, "size": 1, "stride": 1, place: wrong}
    arguments = (storage, given["offset"], (given["size"],), (given["stride"],), False, {})
    with pytest.raises(ValueError, match="with sizes that are none"):
        _made(_Global("torch._utils _rebuild_tensor_v2"), arguments)


@pytest.mark.parametrize(("sizes", "strides"), [(2, 1), (1, 2), (65, 65), (64, 65)])
def test_sizes_and_strides_are_equally_many_and_no_more_than_torch_has(sizes: int, strides: int):
    storage = ("storage", _Global("torch FloatStorage"), "0", "cpu", 1)
    arguments = (_storage(storage), 0, (1,) * sizes, (1,) * strides, False, {})
    with pytest.raises(ValueError, match=f"a tensor of {sizes} sizes and {strides} strides"):
        _made(_Global("torch._utils _rebuild_tensor_v2"), arguments)
    even = (*arguments[:2], (1,) * 64, (1,) * 64, *arguments[4:])
    assert _made(_Global("torch._utils _rebuild_tensor_v2"), even).shape == (1,) * 64


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_not_looked_for_in_what_has_become_a_pipe(tmp_path: Path, suffix: str):
    """It would be waited for without end."""
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors(), path)
    model = open_model([path], "a model")
    name = next(iter(model.tensors))
    stored = model.weights({name: name})[name]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="it is not a regular file"):
        stored.read_into(torch.empty(stored.shape, dtype=stored.dtype))
    with pytest.raises(ValueError, match="it is not a regular file"):
        open_model([path], "a model")


def test_a_name_that_no_file_can_have_is_a_file_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"cannot be read: embedded null"):
        open_model(["/models/a\0b.safetensors"], "a model")


def test_a_pth_of_another_byte_order_or_without_an_end_is_refused(tmp_path: Path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"big" if name.endswith("/byteorder") else data)
    with pytest.raises(ValueError, match="its numbers have the byte order b'big'; it must be little"):
        read_pth(path)


def test_one_tensor_in_two_spellings_is_refused(tmp_path: Path):
    save_file({"_orig_mod.a.weight": torch.zeros(2), "a._orig_mod.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"tensor a\.weight stands there in two spellings"):
        open_model([tmp_path / "x.safetensors"], "a model")


@pytest.mark.parametrize("what", ["bytes", "weights"])
def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path, what: str):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, path)
    model = open_model([path], "a model")
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ValueError, match=rf"{path}: tensor b cannot be read: .*100 bytes early"):
        if what == "bytes":
            model.read_bytes("b")
        else:
            module = torch.nn.Module()
            module.register_parameter("p", torch.nn.Parameter(torch.empty(1000, device="meta")))
            weights = model.weights({"b": "b"})
            fill(module, weights, {"p": "b"}, str(path), dtype=torch.float32, device="cpu")


def test_a_gguf_tensor_is_unpacked_piece_by_piece_from_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, name = tmp_path / "m.gguf", "blocks.0.self_attn.q.weight"
    whole = write_gguf(path, random_weights(), "Q8_0")[name].flatten()
    tensor = open_model([path], "a model").weights({name: name})[name]
    assert tensor.dtype == torch.float32
    monkeypatch.setattr(stored_tensor, "FLOAT_PIECE", 50)
    out = torch.empty(333)
    tensor.read_into(out, start=77)
    torch.testing.assert_close(out, whole[77 : 77 + 333])


@pytest.mark.parametrize(("most", "rows"), [(100, [(2, 3)]), (8, [(2, 2), (4, 1)]), (3, [(2, 1), (3, 1), (4, 1)])])
def test_rows_are_read_in_pieces_of_whole_ones(monkeypatch: pytest.MonkeyPatch, most: int, rows: list[tuple[int, int]]):
    """At least one at a time, however wide it is."""
    monkeypatch.setattr(stored_tensor, "FLOAT_PIECE", most)
    out = torch.zeros(3, 4)
    pieces = list(stored_tensor.row_pieces(out, 8, 4))
    assert [(row, len(piece)) for row, piece in pieces] == rows
    for row, piece in pieces:
        piece.fill_(row)
    assert out[:, 0].tolist() == [row for row, count in rows for _ in range(count)]


def test_every_dtype_is_the_one_that_safetensors_writes_by_that_name(tmp_path: Path):
    for name, dtype in (stored_tensor.DTYPES | stored_tensor.INTEGERS).items():
        save_file({"x": torch.zeros(3, dtype=dtype)}, tmp_path / "x.safetensors")
        assert read_header(tmp_path / "x.safetensors").tensors["x"].dtype == name
        assert 8 * dtype.itemsize == DTYPE_BITS[name], name


def test_a_range_is_read_however_little_comes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A system gives as much as it likes; the end of a file is said by its place."""
    (tmp_path / "x").write_bytes(bytes(range(10)))
    original = os.preadv
    monkeypatch.setattr(regular_files.os, "preadv", lambda fd, parts, offset: original(fd, [parts[0][:3]], offset))
    out = bytearray(7)
    with open(tmp_path / "x", "rb") as file:
        regular_files.read_range(file.fileno(), memoryview(out), 2, "it")
        assert out == bytes(range(2, 9))
        with pytest.raises(OSError, match=r"^it ended at byte 10, 2 bytes early$"):
            regular_files.read_range(file.fileno(), memoryview(out), 5, "it")


@pytest.mark.parametrize(("dtype", "nbytes"), [(torch.bfloat16, 7), (torch.float32, 15), (torch.float64, 8)])
def test_values_are_cast_through_a_buffer_of_any_length(tmp_path: Path, dtype: torch.dtype, nbytes: int):
    save_file({"x": torch.arange(10, dtype=dtype)}, tmp_path / "x.safetensors")
    tensor = open_model([tmp_path / "x.safetensors"], "a model").weights({"x": "x"})["x"]
    out = torch.empty(8, dtype=torch.float16)
    tensor.read_into(out, start=2, staging=torch.empty(nbytes, dtype=torch.uint8))
    assert out.tolist() == list(range(2, 10))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".PTH"])
def test_a_pickle_is_known_by_each_of_its_endings(tmp_path: Path, suffix: str):
    wrapped = "module._orig_mod._fsdp_wrapped_module.a._checkpoint_wrapped_module.weight"
    torch.save({wrapped: torch.ones(2)}, tmp_path / f"x{suffix}")
    assert open_model([tmp_path / f"x{suffix}"], "a model").shapes == {"module.a.weight": (2,)}
