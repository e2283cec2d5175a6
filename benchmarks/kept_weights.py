"""Weights in 8 bits: memory and time of one expert from bf16, fp8 and int8 files, and of changing a LoRA's strength.

    python benchmarks/kept_weights.py --folder /dev/shm/wan
    python benchmarks/kept_weights.py --folder /dev/shm/wan --files fp8 --size 1280x720x81

One GPU. For each file, of random weights of the true shapes, every way to keep and to multiply it, without a LoRA and
with one of every large layer; then that LoRA's strength is changed as a kept group does it. Files are written, measured
and deleted one after the other: 29 GB at a time. Prints a table and appends a JSON line for each row to
benchmarks/results.jsonl. On a machine without a GPU, with `--model tiny --size 64x48x5`, the same runs on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pack import RESULTS, append_results, mount_pack
from random_models import THREADS, WEIGHT_STD, bank, model_config, write_model
from torch import Tensor

COLUMNS = ("file", "linear_precision", "lora", "load_seconds", "weights_gib", "peak_gib", "seconds_per_forward",
           "strength_seconds", "what")  # fmt: skip
RANK = 64
TEXT_TOKENS = 512
TIMESTEP = 700.0


CASES = {
    "bf16": [("full", "none"), ("full", "merged"), ("fp8", "none"), ("int8", "none")],
    "fp8": [("full", "none"), ("full", "merged"), ("full", "beside"), ("fp8", "none"), ("fp8", "beside")],
    "int8": [("full", "none"), ("int8", "none"), ("int8", "merged"), ("int8", "beside")],
    "convrot": [("int8", "none"), ("int8", "beside")],
}
"""File -> (linear_precision, how the LoRA is kept)."""


def write_file(folder: Path, kind: str, model: str) -> list[Path]:
    """An expert's files with weights of the same spread in each."""
    if kind == "bf16":
        return sorted((write_model(folder, model) / "high_noise_model").glob("*.safetensors"))
    from wan_pack.wan.transformer.transformer import meta_model

    shapes = {name: tuple(p.shape) for name, p in meta_model(model_config(model), torch.bfloat16).named_parameters()}
    code = "F8_E4M3" if kind == "fp8" else "I8"
    quantised = {name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2}
    header: dict[str, Any] = {}
    size = 0

    def add(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
        nonlocal size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + nbytes]}
        size += nbytes

    # The smallest last, so that all others are aligned.
    for name, shape in shapes.items():
        count = math.prod(shape)
        add(name, code if name in quantised else "BF16", list(shape), count if name in quantised else 2 * count)
    for name in quantised:
        add(f"{name}_scale", "F32", [shapes[name][0], 1], 4 * shapes[name][0])
    says = json.dumps({"format": "int8_tensorwise", "convrot": True, "per_row": True}).encode()
    if kind == "convrot":
        for name in quantised:
            add(f"{name.removesuffix('.weight')}.comfy_quant", "U8", [len(says)], len(says))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.safetensors"
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    whole = torch.from_file(str(draft), shared=True, size=8 + len(text) + size, dtype=torch.uint8)
    data, numbers = whole[8 + len(text) :], bank().float()
    largest = 448.0 if kind == "fp8" else 127.0
    codes = (numbers * (largest / 5)).clamp_(-largest, largest)
    codes = codes.to(torch.float8_e4m3fn) if kind == "fp8" else codes.round_().to(torch.int8)
    floats = (numbers * WEIGHT_STD).bfloat16()

    def fill(name: str) -> None:
        first, last = header[name]["data_offsets"]
        part = data[first:last]
        if name.endswith("_scale"):
            part.view(torch.float32).fill_(WEIGHT_STD * 5 / largest)
        elif name.endswith(".comfy_quant"):
            part.copy_(torch.frombuffer(bytearray(says), dtype=torch.uint8))
        else:
            source = codes.view(torch.uint8) if name in quantised else floats.view(torch.uint8)
            for start in range(0, part.numel(), source.numel()):
                end = min(start + source.numel(), part.numel())
                part[start:end] = source[: end - start]

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(fill, header))
    os.replace(draft, path)
    return [path]


def write_lora(folder: Path, model: str) -> Path:
    """Of every linear layer of the blocks, of 1 % of its weight."""
    from safetensors.torch import save_file
    from wan_pack.wan.transformer.transformer import meta_model

    path, config = folder / "lora.safetensors", model_config(model)
    rank = min(RANK, config.dim // 4)
    generator, tensors = torch.Generator().manual_seed(3), {}
    spread = math.sqrt(0.01 * WEIGHT_STD / math.sqrt(rank))
    for name, parameter in meta_model(config, torch.bfloat16).named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight") and parameter.dim() == 2:
            layer, (out, width) = name.removesuffix(".weight"), parameter.shape
            for factor, shape in (("lora_up", (out, rank)), ("lora_down", (rank, width))):
                tensors[f"{layer}.{factor}.weight"] = (torch.randn(shape, generator=generator) * spread).bfloat16()
    save_file(tensors, path)
    return path


class Measurement:
    """Of one expert on one device."""

    def __init__(self, model: str, size: tuple[int, int, int], repeats: int, device: torch.device) -> None:
        from wan_pack.wan.model.attention_kernels import choose_kernel
        from wan_pack.wan.model.kernels.choice import choose_ops
        from wan_pack.wan.model.patch import token_grid
        from wan_pack.wan.model.rope import rope_table

        self._device, self._repeats = device, repeats
        self._config = model_config(model)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        self.kernel = choose_kernel(capability, "bfloat16")
        self.ops, _ = choose_ops(capability)
        width, height, frames = size
        latents = self._config.variant.latents.shape(width, height, frames)
        self._grid = token_grid(latents)
        generator = torch.Generator(device).manual_seed(5)
        tokens = math.prod(self._grid)
        self._tokens = torch.randn(tokens, 4 * self._config.in_dim, generator=generator, device=device)
        self._text = torch.randn(TEXT_TOKENS, self._config.text_dim, generator=generator, device=device)
        self._rope = rope_table(self._grid, self._config.head_dim, start=0, stop=tokens, device=device)

    def row(self, files: list[Path], lora: Path, precision: str, kept: str) -> dict[str, Any]:
        """Loads the expert, evaluates it, and changes the LoRA's strength.

        Args:
            precision: linear_precision.
            kept: none, or quantised_loras.
        """
        from wan_pack.distributed.job.parallel import Parallel
        from wan_pack.distributed.parallel.sequence import SequenceShard
        from wan_pack.distributed.rank.expert import load_expert, relora_expert

        paths, loras = [str(file) for file in files], [] if kept == "none" else [(str(lora), 1.0)]
        how = {"linear_precision": precision, "quantised_loras": kept if loras else "merged"}
        parallel = Parallel(gpu_count=1, **how)
        holders: list[Any] = []
        self._fresh()
        model, seconds = self._timed(
            lambda: load_expert(
                paths, loras, parallel=parallel, mesh=None, shard=SequenceShard(length=math.prod(self._grid)),
                device=self._device, attention=self.kernel.run, ops=self.ops, on_weights=holders.append,
            )
        )  # fmt: skip
        found: dict[str, Any] = {"load_seconds": round(seconds, 2)}
        found["weights_gib"] = round(sum(p.nbytes for p in model.parameters()) / 2**30, 2)
        self._fresh()
        times = [self._timed(lambda: self._evaluate(model))[1] for _ in range(self._repeats + 1)]
        found["seconds_per_forward"] = round(statistics.median(times[1:]), 3)
        if self._device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**30, 2)
        if loras:
            changes = []
            for strength in (0.5, 1.0):
                with holders[0].writable():
                    changed, seconds = self._timed(
                        lambda strength=strength: relora_expert(
                            model, paths, [str(lora)], [(str(lora), strength)], parallel=parallel, device=self._device
                        )
                    )
                assert changed, "another strength of the same LoRA"
                changes.append(seconds)
            found["strength_seconds"] = round(min(changes), 3)
        holders[0].drop()
        return found

    def _evaluate(self, model: Any) -> Tensor:
        from wan_pack.wan.transformer.context import Context

        timestep = torch.tensor([TIMESTEP], device=self._device)
        with torch.no_grad(), self.kernel.activate():
            output: Tensor = model(self._tokens, timestep, Context(self._text), self._rope)
        return output

    def _timed(self, run: Callable[[], Any]) -> tuple[Any, float]:
        self._wait()
        start = time.perf_counter()
        result = run()
        self._wait()
        return result, time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _fresh(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["comfy-kitchen"] = importlib.metadata.version("comfy-kitchen")
    return found


def rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    width, height, frames = map(int, arguments.size.split("x"))
    measurement = Measurement(arguments.model, (width, height, frames), arguments.repeats, device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"benchmark": "kept_weights", "model": arguments.model, "size": arguments.size, "gpu": gpu, **versions()}
    about |= {"attention": measurement.kernel.name, "kernels": measurement.ops}
    for kind in arguments.files:
        folder = arguments.folder / "kept_weights"
        files, lora = write_file(folder, kind, arguments.model), write_lora(folder, arguments.model)
        for precision, kept in CASES[kind]:
            line = {**about, "file": kind, "linear_precision": precision, "lora": kept}
            try:
                line |= measurement.row(files, lora, precision, kept)
            except (ValueError, RuntimeError) as error:
                line["what"] = str(error).partition("\n")[0]
            yield line
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the files; a folder in memory is fastest")
    parser.add_argument("--model", default="t2v-A14B", help="as of random_models.py")
    parser.add_argument("--size", default="832x480x81", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--files", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=2, help="forwards that are timed, behind one that is not")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    mount_pack()
    from wan_pack.wan.model.int8_products import int8_products_there

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    by_kitchen = device.type == "cuda" and int8_products_there()
    print(f"int8: {'products by comfy-kitchen' if by_kitchen else 'unpacked for each use'}\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for line in rows(arguments, device):
        append_results(line, arguments.results)
        print("| " + " | ".join(str(line.get(column, "")) for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
