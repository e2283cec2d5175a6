"""What the largest headers, indexes and tokenizers that are let through cost: seconds and memory.

    python benchmarks/opening_files.py

Prints a row for each kind of file: the size of what is read, processor seconds to open it, and by how much the peak
of the process's memory is over what it held before. Each is opened in a process of its own, a fork of one that has
imported everything; imports do not count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from largest_files import (
    config,
    gguf_header,
    gguf_tokenizer,
    layers_with_a_format,
    many_notes,
    modules_of_a_lora,
    one_long_note,
    pth_directory,
    pth_list,
    shards,
    spiece_model,
    tensors_of_a_header,
    tokenizer_json,
)
from real_size import mount_pack


def open_model(path: Path) -> Any:
    from wan_pack.wan.files.stored_model import open_model

    return open_model([path], "a model")


def open_shards(path: Path) -> Any:
    from wan_pack.wan.files.model_folder import folder_files
    from wan_pack.wan.files.stored_model import open_model

    return open_model(folder_files(path, "a model"), "a model")


def open_lora(path: Path) -> Any:
    from wan_pack.wan.lora.lora import Lora

    sizes = {f"blocks.{i}.{name}.weight": (4, 1) for i in range(40) for name in ("ffn.0", "self_attn.q")}
    return Lora(path, 1.0, sizes)


def open_config(path: Path) -> Any:
    from wan_pack.wan.files.model_folder import read_json_object

    return read_json_object(path)


def open_gguf_tokenizer(path: Path) -> Any:
    from wan_pack.wan.files.gguf_files import GgufFile
    from wan_pack.wan.text.gguf_tokenizer import sentencepiece_model
    from wan_pack.wan.text.tokenizer import Tokenizer

    return Tokenizer(sentencepiece_model(GgufFile(path)), label=str(path))


def open_tokenizer(path: Path) -> Any:
    from wan_pack.wan.text.tokenizer import Tokenizer

    return Tokenizer(path)


KINDS: dict[Callable[[Path], Path], Callable[[Path], Any]] = {
    tensors_of_a_header: open_model,
    layers_with_a_format: open_model,
    one_long_note: open_model,
    many_notes: open_model,
    modules_of_a_lora: open_lora,
    shards: open_shards,
    config: open_config,
    gguf_header: open_model,
    gguf_tokenizer: open_gguf_tokenizer,
    pth_list: open_model,
    pth_directory: open_model,
    tokenizer_json: open_tokenizer,
    spiece_model: open_tokenizer,
}


def measure(kind: str, path: Path) -> dict[str, float]:
    """Opens the file in this process. ValueError if it is refused."""
    # The peak so far is that of the imports.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _kib("VmRSS"), time.process_time()
    opened = {make.__name__: open_file for make, open_file in KINDS.items()}[kind](path)
    seconds, peak = time.process_time() - start, _kib("VmHWM")
    assert opened is not None
    return {"seconds": seconds, "mib": (peak - before) / 1024}


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_fork(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, of JSON's types, in a process that ends with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writer, json.dumps(work(*arguments), default=str).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"{getattr(work, '__name__', work)} failed: {arguments}")
    return json.loads(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    mount_pack()
    for name in ("gguf", "sentencepiece", "tokenizers", "wan_pack.wan.lora.lora", "wan_pack.wan.text.gguf_tokenizer"):
        importlib.import_module(name)
    print("| file | MiB | seconds | memory MiB |\n| --- | --- | --- | --- |", flush=True)
    for make in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            # Not here either: what is freed here would be taken again for free there.
            path = Path(in_a_fork(make, Path(folder)))
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())) / 2**20
            cost = in_a_fork(measure, make.__name__, path)
        row = f"| {make.__name__.replace('_', ' ')} | {size:.1f} | {cost['seconds']:.2f} | {cost['mib']:.0f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
