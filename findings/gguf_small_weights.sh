#!/usr/bin/env bash
# Guess: a GGUF type has one error, whatever the weights' size, and 8 bits are nearer than 4.
# Seen, gguf 0.19.0: as long as the weights are near 1. Q8_0's scale is largest / 127 in half precision, Q4_0's largest / 8:
# the first runs out of numbers first. At a standard deviation of 1e-4 Q8_0's error has doubled, at 1e-5 it is larger than
# Q4_0's, at 1e-6 nothing is left of the weights (Q4_0: 11 %); MXFP4 and BF16, whose exponents are wide, do not mind. At 1e6
# Q8_0 still works, and Q4_0 is NaN. None of it raises or warns.
# Costs: a file of "nearly lossless" Q8_0 in which layers of small weights are gone.
# Here: GGUF is read, never written; int8 and fp8 scales that the pack makes are float32.
#
# Output on 2026-11-28:
#   gguf 0.19.0 numpy 2.4.6
#   standard deviation 1e+06 1 0.0001 1e-05 1e-06
#   Q8_0 0.53 % 0.53 % 1.01 % 9.73 % 99.88 %
#   Q4_0 nan % 8.70 % 8.70 % 8.72 % 10.76 %
#   Q5_0 nan % 4.20 % 4.20 % 4.37 % 11.51 %
#   MXFP4 11.81 % 11.96 % 11.79 % 11.69 % 11.65 %
#   BF16 0.16 % 0.16 % 0.17 % 0.16 % 0.17 %
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet numpy==2.4.6 gguf==0.19.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType, quants

SIZES = (1e6, 1.0, 1e-4, 1e-5, 1e-6)
weights = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)


def error(kind, size):
    given = weights * np.float32(size)
    with np.errstate(all="ignore"):
        read = quants.dequantize(quants.quantize(given, kind), kind)
    return float(np.linalg.norm(read / np.float32(size) - weights) / np.linalg.norm(weights))


print("gguf", version("gguf"), "numpy", np.__version__)
print("standard deviation", *(f"{size:g}" for size in SIZES))
seen = {}
for name in ("Q8_0", "Q4_0", "Q5_0", "MXFP4", "BF16"):
    seen[name] = [error(GGMLQuantizationType[name], size) for size in SIZES]
    print(name, *(f"{100 * value:.2f} %" for value in seen[name]))
large, plain, e4, e5, e6 = range(len(SIZES))
assert seen["Q8_0"][plain] < 0.006 and seen["Q8_0"][e4] > 1.8 * seen["Q8_0"][plain]
assert seen["Q8_0"][e5] > seen["Q4_0"][e5] and seen["Q8_0"][e6] > 0.99 and seen["Q4_0"][e6] < 0.12
assert seen["Q8_0"][large] < 0.006 and np.isnan(seen["Q4_0"][large])
for name in ("MXFP4", "BF16"):
    assert max(seen[name]) < 1.1 * min(seen[name]), name
PYTHON
cd "$work"
"$python" -W ignore finding.py
