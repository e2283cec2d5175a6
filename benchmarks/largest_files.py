"""Files at the bounds of what is opened, of every kind: headers, indexes, configs and tokenizers."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_safetensors(path: Path, tensors: Mapping[str, tuple[list[int], bytes]], **metadata: str) -> None:
    """tensors: name -> shape of eight-bit numbers, and bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (shape, data) in tensors.items():
        entries[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [offset, offset := offset + len(data)]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values()))


def write_gguf(path: Path, values: list[bytes], tensors: int) -> None:
    """values: of metadata, with key and type. The tensors are of one float32 each."""
    entries = [_string(f"t{i:06}") + struct.pack("<IQIQ", 1, 1, 0, 4 * i) for i in range(tensors)]
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values)) + b"".join((*values, *entries))
    path.write_bytes(head + bytes(-len(head) % 32 + 4 * tensors))


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _list(key: str, type_id: int, count: int, items: bytes) -> bytes:
    return _string(key) + struct.pack("<IIQ", 9, type_id, count) + items


def tensors_of_a_header(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_TENSORS

    path = folder / "tensors.safetensors"
    write_safetensors(path, {f"{i:06}{'x' * 400}": ([1, 1, 1, 1, 1], b"\0") for i in range(MAX_TENSORS)})
    return path


def layers_with_a_format(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_TENSORS
    from wan_pack.wan.files.quant_formats import MAX_TENSOR_BYTES

    path = folder / "formats.safetensors"
    says = json.dumps({"format": "float8_e4m3fn", "x": [0] * 50}, separators=(",", ":")).encode()
    says = says.ljust(MAX_TENSOR_BYTES, b"\0")
    write_safetensors(path, {f"{i:06}.comfy_quant": ([len(says)], says) for i in range(MAX_TENSORS)})
    return path


def one_long_note(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_HEADER_BYTES

    path = folder / "note.safetensors"
    # One character beyond the first 65536 makes Python keep all in four bytes each.
    write_safetensors(path, {"a": ([1], b"\0")}, note="\U0001f98a" + "x" * (MAX_HEADER_BYTES - 200))
    return path


def many_notes(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_PARTS

    path = folder / "notes.safetensors"
    write_safetensors(path, {"a": ([1], b"\0")}, **{f"{i:06}": f"note {i:020}" for i in range(MAX_PARTS - 20)})
    return path


def modules_of_a_lora(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_TENSORS

    path = folder / "lora.safetensors"
    pair = {"A": 1, "B": 4}
    tensors = {f"diffusion_model.blocks.0.ffn.0.lora_{x}.weight": ([n, 1], bytes(n)) for x, n in pair.items()}
    tensors |= {f"diffusion_model.blocks.{i}.x{'.x' * 110}.lora_A.weight": ([1], b"\0") for i in range(MAX_TENSORS - 2)}
    patterns = json.dumps({"lora_alpha": 1, "alpha_pattern": {f"{i:06}": 1 for i in range(80_000)}})
    write_safetensors(path, tensors, lora_adapter_metadata=patterns)
    return path


def shards(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_TENSORS
    from wan_pack.wan.files.model_folder import MAX_SHARDS

    each, weight_map = MAX_TENSORS // MAX_SHARDS, {}
    for shard in range(MAX_SHARDS):
        names = [f"{shard:03}.{i:03}.{'x' * 50}" for i in range(each)]
        write_safetensors(folder / f"{shard}.safetensors", {name: ([1], b"\0") for name in names}, note="x" * 40_000)
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def config(folder: Path) -> Path:
    from wan_pack.wan.files.headers import MAX_PARTS

    path = folder / "config.json"
    path.write_text(json.dumps({"x": [[f"{i:05}"] for i in range(MAX_PARTS // 2 - 2)]}, separators=(",", ":")))
    return path


def gguf_header(folder: Path) -> Path:
    from wan_pack.wan.files.gguf_files import MAX_ITEMS
    from wan_pack.wan.files.headers import MAX_TENSORS

    path = folder / "header.gguf"
    strings = _list("strings", 8, MAX_ITEMS, b"".join(_string(f"{i:06}") for i in range(MAX_ITEMS)))
    short = [_list(f"k{i:05}", 12, 18, struct.pack("<18d", *range(i, i + 18))) for i in range(MAX_TENSORS)]
    write_gguf(path, [strings, *short], MAX_TENSORS)
    return path


def gguf_tokenizer(folder: Path) -> Path:
    from wan_pack.wan.text.tokenizer_bounds import MAX_SPIECE_BYTES

    path = folder / "tokenizer.gguf"
    # A piece of six letters takes 17 bytes of the model that is made of it.
    count = MAX_SPIECE_BYTES // 17 - 10
    words = ["<pad>", "</s>", "<unk>", *(f"{i:06x}" for i in range(count - 3))]
    write_gguf(
        path,
        [
            _string("tokenizer.ggml.model") + struct.pack("<I", 8) + _string("t5"),
            _list("tokenizer.ggml.tokens", 8, count, b"".join(map(_string, words))),
            _list("tokenizer.ggml.scores", 6, count, struct.pack(f"<{count}f", *[-1.0] * count)),
            _list("tokenizer.ggml.token_type", 5, count, struct.pack(f"<{count}i", 3, 3, 2, *[1] * (count - 3))),
        ],
        1,
    )
    return path


def pth_list(folder: Path) -> Path:
    from wan_pack.wan.files.pth_files import MAX_INDEX_BYTES, MAX_OPCODES

    path = folder / "list.pth"
    words = b"".join(b"X\x06\0\0\0%06d" % i for i in range(MAX_INDEX_BYTES // 11 - 10))
    words += b"N" * (MAX_OPCODES - MAX_INDEX_BYTES // 11)
    _write_zip(path, {"archive/data.pkl": (b"\x80\x02" + words)[: MAX_INDEX_BYTES - 2] + b"}."})
    return path


def pth_directory(folder: Path) -> Path:
    from wan_pack.wan.files.pth_files import MAX_DIRECTORY_BYTES

    path = folder / "directory.pth"
    _write_zip(path, {"a/data.pkl": b"\x80\x02}.", **{f"{i:05}": b"" for i in range(MAX_DIRECTORY_BYTES // 51 - 10)}})
    return path


def _write_zip(path: Path, entries: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def tokenizer_json(folder: Path) -> Path:
    from wan_pack.wan.text.tokenizer_bounds import MAX_STRING_BYTES

    path = folder / "tokenizer.json"
    # Few share a beginning: each character is a place of its own in the library's tree.
    words = [f"{i:05x}{'x' * 12}" for i in range(MAX_STRING_BYTES // 19 - 100)]
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([word, -1.5] for word in words)]
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path.write_text(json.dumps({"version": "1.0", **nothing, "added_tokens": [], "model": model}))
    return path


def spiece_model(folder: Path) -> Path:
    from wan_pack.wan.text.tokenizer_bounds import MAX_PIECES

    path = folder / "spiece.model"

    def pieces() -> Iterable[bytes]:
        for i, word in enumerate(("<pad>", "</s>", "<unk>", *(f"{i:05x}" for i in range(MAX_PIECES - 8)))):
            text = word.encode()
            kind = (b"\x18\x03", b"\x18\x03", b"\x18\x02")[i] if i < 3 else b""
            piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1.0) + kind
            yield b"\x0a" + bytes([len(piece)]) + piece

    path.write_bytes(b"".join(pieces()) + b"\x12\x02\x18\x01")
    return path
