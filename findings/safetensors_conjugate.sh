#!/usr/bin/env bash
# Guess: save_file writes what a tensor prints, or refuses views that it cannot write, as it refuses transposed ones.
# Seen, safetensors 0.8.0: of a conjugated complex tensor it writes the values before conjugation, without a word.
# torch conjugates lazily, by a mark on the tensor; torch.save keeps it.
# Costs: a table of rotary embeddings kept as complex numbers and conjugated (to turn keys back) is turned the other way
# after saving and loading.
# Here: the pack writes no complex tensors; rotary tables are computed, never stored (wan/model/rope.py).
#
# Output on 2026-11-28:
#   safetensors 0.8.0 torch 2.13.0+cpu
#   saved  [(0.8775825500488281-0.4794255495071411j), (0.5403022766113281-0.8414709568023682j)]
#   loaded [(0.8775825500488281+0.4794255495071411j), (0.5403022766113281+0.8414709568023682j)]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import io
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file

turned = torch.polar(torch.ones(2), torch.tensor([0.5, 1.0])).conj()
assert turned.is_contiguous()
save_file({"table": turned}, "file.safetensors")
loaded = load_file("file.safetensors")["table"]
buffer = io.BytesIO()
torch.save(turned, buffer)
buffer.seek(0)
print("safetensors", version("safetensors"), "torch", torch.__version__)
print("saved ", turned.tolist())
print("loaded", loaded.tolist())
assert torch.equal(loaded, turned.conj()) and not torch.equal(loaded, turned)
assert torch.equal(torch.load(buffer), turned)
PYTHON
cd "$work"
"$python" -W ignore finding.py
