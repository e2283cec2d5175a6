#!/usr/bin/env bash
# Guess: a tensor that save_file writes can be read row by row through get_slice, as every other dtype can; and its shape
# in the header is the tensor's.
# Seen, safetensors 0.8.0 with torch 2.11.0: float4_e2m1fn_x2 [4, 8] is written as F4 [4, 16], the numbers and not the
# bytes counted. load_file and get_tensor halve the last dimension again and return what was saved, in every byte;
# get_slice does not, and raises "shape '[4, 16]' is invalid" for every slice, even the whole tensor. Other one-byte
# floats are sliced rightly, and so is the same tensor saved as its bytes (U8).
# Costs: a file that loads whole cannot be read row by row, which is how sharded ranks read.
# Here: 4-bit weights are read where they lie as bytes (U8, as ComfyUI writes nvfp4); F4 is refused by name before a
# process starts, and rows are read from the file by their place, not through get_slice.
#
# Output on 2026-11-28:
#   safetensors 0.8.0 torch 2.11.0+cu130
#   float4_e2m1fn_x2 saved [4, 8] header F4 [4, 16] load_file [4, 8] same bytes, get_tensor [4, 8] same bytes
#     rows: RuntimeError, columns: RuntimeError, all: RuntimeError
#   float8_e8m0fnu saved [4, 8] header F8_E8M0 [4, 8] load_file [4, 8] same bytes, get_tensor [4, 8] same bytes
#     rows: same bytes, columns: same bytes, all: same bytes
#   uint8 saved [4, 8] header U8 [4, 8] load_file [4, 8] same bytes, get_tensor [4, 8] same bytes
#     rows: same bytes, columns: same bytes, all: same bytes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 safetensors==0.8.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

print("safetensors", version("safetensors"), "torch", torch.__version__)
path = Path(sys.argv[1]) / "w.safetensors"
values = torch.arange(32, dtype=torch.uint8).view(4, 8)


def compared(read, expected):
    try:
        found = read()
    except RuntimeError:
        return "RuntimeError"
    return "same bytes" if torch.equal(found.view(torch.uint8), expected) else "other bytes"


seen = {}
for dtype in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, torch.uint8):
    saved = values.view(dtype)
    save_file({"w": saved}, path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["w"]
    loaded = load_file(path)["w"]
    with safe_open(path, "pt") as file:
        tensor, part = file.get_tensor("w"), file.get_slice("w")
        whole = [compared(lambda t=t: t, values) for t in (loaded, tensor)]
        rows = compared(lambda: part[1:3], values[1:3])
        columns = compared(lambda: part[:, 2:4], values[:, 2:4])
        everything = compared(lambda: part[:], values)
    name = str(dtype).removeprefix("torch.")
    print(f"{name} saved {list(saved.shape)} header {header['dtype']} {header['shape']}", end=" ")
    print(f"load_file {list(loaded.shape)} {whole[0]}, get_tensor {list(tensor.shape)} {whole[1]}")
    print(f"  rows: {rows}, columns: {columns}, all: {everything}")
    seen[name] = header["shape"], *whole, rows, columns, everything

same, error = "same bytes", "RuntimeError"
assert seen["float4_e2m1fn_x2"] == ([4, 16], same, same, error, error, error)
assert seen["float8_e8m0fnu"] == ([4, 8], same, same, same, same, same)
assert seen["uint8"] == ([4, 8], same, same, same, same, same)
PYTHON
"$python" "$work/finding.py" "$work"
