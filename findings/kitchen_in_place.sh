#!/usr/bin/env bash
# Guess: adding in place to a quantised weight raises, or quantises the sum again.
# Seen: with comfy-kitchen 0.2.40, add_, +=, zero_, an assigned slice, out= and .data = return without an error
# and change nothing, for int8, fp8, mxfp8 and nvfp4. Only copy_ from a plain tensor raises.
# Costs: code that merges a LoRA in place (weight += strength * update) runs, and the video has no LoRA in it.
# Here: LoRAs are merged into plain rows before anything is quantised, so this pack is not touched.
#
# Output on 2026-11-28:
#   comfy-kitchen 0.2.40 torch 2.13.0+cpu
#   TensorWiseINT8Layout: unchanged after add_, +=, zero_, weight[:3] =, out=, .data =; copy_ raises: Cannot copy Tensor to QuantizedTensor
#   TensorCoreFP8Layout: unchanged after add_, +=, zero_, weight[:3] =, out=, .data =; copy_ raises: Cannot copy Tensor to QuantizedTensor
#   TensorCoreMXFP8Layout: unchanged after add_, +=, zero_, weight[:3] =, out=, .data =; copy_ raises: Cannot copy Tensor to QuantizedTensor
#   TensorCoreNVFP4Layout: unchanged after add_, +=, zero_, weight[:3] =, out=, .data =; copy_ raises: Cannot copy Tensor to QuantizedTensor
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 comfy-kitchen==0.2.40 packaging==26.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from comfy_kitchen.tensor import QuantizedTensor

EDITS = {
    "add_": lambda weight, update: weight.add_(update),
    "+=": lambda weight, update: weight.__iadd__(update),
    "zero_": lambda weight, update: weight.zero_(),
    "weight[:3] =": lambda weight, update: weight.__setitem__(slice(0, 3), update[:3]),
    "out=": lambda weight, update: torch.add(update, update, out=weight),
    ".data =": lambda weight, update: setattr(weight, "data", update),
}

print("comfy-kitchen", version("comfy-kitchen"), "torch", torch.__version__)
torch.manual_seed(0)
plain, update = torch.randn(64, 512, dtype=torch.bfloat16), torch.randn(64, 512, dtype=torch.bfloat16)
for layout in ("TensorWiseINT8Layout", "TensorCoreFP8Layout", "TensorCoreMXFP8Layout", "TensorCoreNVFP4Layout"):
    before = QuantizedTensor.from_float(plain, layout).dequantize()
    for name, edit in EDITS.items():
        weight = QuantizedTensor.from_float(plain, layout)
        edit(weight, update)
        assert torch.equal(weight.dequantize(), before), (layout, name)
    weight = QuantizedTensor.from_float(plain, layout)
    try:
        weight.copy_(update)
    except TypeError as error:
        print(f"{layout}: unchanged after {', '.join(EDITS)}; copy_ raises: {error}")
    else:
        raise AssertionError(layout)
PYTHON
cd "$work"
"$python" -W ignore finding.py
