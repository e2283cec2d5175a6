#!/usr/bin/env bash
# Guess: a 4-bit weight [rows, columns] is stored as bytes [rows, columns / 2] with neighbours in one byte, and a scale
# per group of 128.
# Seen, optimum-quanto 0.2.7: a weight [64, 512] is stored as bytes [128, 128]: groups of 128 lie in rows of their own,
# and a byte holds group i and group i + half, so row 0 shares its bytes with row 32. Neither the shape nor the group is in
# the file, the group shrinks to fit (64 for 320 columns, whole rows for 200), the shift is subtracted after scaling.
# Costs: a rank cannot read its rows only, and unpacking neighbours gives noise (error 1.4 instead of 0.065).
# Here: such transformers are refused: their tensors are no Wan model's by name and shape.
#
# Output on 2026-11-28:
#   optimum-quanto 0.2.7 torch 2.13.0+cpu
#   weight [64, 512]: bytes [128, 128], scales [256, 1]; error of halves 0.065, of neighbours 1.415
#   320 columns: bytes [160, 64], 5 groups per row
#   200 columns: bytes [32, 200], 1 groups per row
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 optimum-quanto==0.2.7
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from optimum.quanto import freeze, qint4, quantize


def quantised(columns):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(columns, 64, bias=False))
    weight = model[0].weight.detach().clone()
    quantize(model, weights=qint4)
    freeze(model)
    return weight, model[0].weight.dequantize(), model.state_dict()


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


print("optimum-quanto", version("optimum-quanto"), "torch", torch.__version__)
weight, back, stored = quantised(512)
packed, scale, shift = (stored[f"0.weight.{name}"] for name in ("_data._data", "_scale", "_shift"))
low, high = packed & 15, packed >> 4
halves = (torch.cat([low, high]) * scale - shift).reshape(64, 512)
neighbours = (torch.stack([low, high], -1).reshape(256, 128) * scale - shift).reshape(64, 512)
print(f"weight [64, 512]: bytes {list(packed.shape)}, scales {list(scale.shape)}; error of halves "
      f"{difference(halves, weight):.3f}, of neighbours {difference(neighbours, weight):.3f}")
assert list(packed.shape) == [128, 128] and list(scale.shape) == [256, 1]
assert torch.equal(halves, back) and difference(neighbours, weight) > 1
for columns, groups in ((320, 5), (200, 1)):
    stored = quantised(columns)[2]
    print(f"{columns} columns: bytes {list(stored['0.weight._data._data'].shape)}, "
          f"{len(stored['0.weight._scale']) // 64} groups per row")
    assert len(stored["0.weight._scale"]) == 64 * groups
PYTHON
cd "$work"
"$python" -W ignore finding.py
