#!/usr/bin/env bash
# Guess: .to(torch.float32), .float() or .half() of a quantised weight gives that dtype, or raises, as add_ and mul_ do;
# nbytes is what it takes.
# Seen, torchao 0.18.0, Linear in bf16 after quantize_ with Int8WeightOnlyConfig and Float8WeightOnlyConfig: they return a
# quantised tensor whose dtype is bf16 as before, and model.half() converts nothing. nbytes is that of bf16, twice what the
# weight takes; for its codes and scales one has to ask its parts.
# Costs: a LoRA added in float32, or a check of dtypes, is in bf16 after all; a plan by nbytes counts double.
# Here: quantised weights are codes and scales of our own, whose bytes the plan counts (wan/model/eight_bits.py).
#
# Output on 2026-11-28:
#   torchao 0.18.0 torch 2.11.0+cu130
#   Int8Tensor .to(float32): Int8Tensor torch.bfloat16
#   Int8Tensor .float(): Int8Tensor torch.bfloat16
#   Int8Tensor model.half(): Int8Tensor torch.bfloat16
#   Int8Tensor add_: NotImplementedError; nbytes 4096, taken 2176
#   Float8Tensor .to(float32): Float8Tensor torch.bfloat16
#   Float8Tensor .float(): Float8Tensor torch.bfloat16
#   Float8Tensor model.half(): Float8Tensor torch.bfloat16
#   Float8Tensor add_: NotImplementedError; nbytes 4096, taken 2176
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 torchao==0.18.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

print("torchao", version("torchao"), "torch", torch.__version__)
for config in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    quantize_(model, config)
    weight = model[0].weight
    parts = {name: getattr(weight, name) for name in ("qdata", "scale")}
    taken = sum(part.nbytes for part in parts.values())
    casts = {".to(float32)": weight.to(torch.float32), ".float()": weight.float(), "model.half()": model.half()[0].weight}
    for name, cast in casts.items():
        print(f"{type(weight).__name__} {name}: {type(cast).__name__} {cast.dtype}")
        assert type(cast) is type(weight) and cast.dtype == torch.bfloat16
    try:
        weight.data.add_(1)
        raise AssertionError("add_ went well")
    except NotImplementedError:
        print(f"{type(weight).__name__} add_: NotImplementedError; nbytes {weight.nbytes}, taken {taken}")
    assert weight.nbytes == 2 * 64 * 32 and taken < 0.6 * weight.nbytes
PYTHON
cd "$work"
"$python" -W ignore finding.py
