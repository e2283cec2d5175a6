#!/usr/bin/env bash
# Guess: what float8_e8m0fnu cannot hold becomes NaN, or its nearest number: it has no sign, no zero and no infinity.
# Seen, torch 2.11.0 and 2.13.0, CPU: a sign is dropped, -4 becomes 4 and -3 becomes 4; 0 becomes 2**-127, which in a scale
# is not 0; infinity becomes NaN. Between two powers the nearer one is taken, 1.4 becomes 1: values of a block whose scale
# was to be 1.4 no longer fit their codes, where the MX formats round down and then saturate on purpose.
# Costs: scales cast so are wrong without a sign of it.
# Here: scales of mxfp8 files are read from their bits (wan/files/block_scaled.py); none are written.
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   -4 -> 4
#   -3 -> 4
#   0 -> 5.87747e-39
#   -0 -> 5.87747e-39
#   1.4 -> 1
#   1.5 -> 2
#   6 -> 8
#   7.17465e-43 -> 5.87747e-39
#   inf -> nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import math

import torch

print("torch", torch.__version__)
given = [-4.0, -3.0, 0.0, -0.0, 1.4, 1.5, 6.0, 2.0**-140, math.inf]
read = torch.tensor(given).to(torch.float8_e8m0fnu).float().tolist()
for before, after in zip(given, read):
    print(f"{before:g} -> {after:g}")
assert read[:-1] == [4, 4, 2.0**-127, 2.0**-127, 1, 2, 8, 2.0**-127] and math.isnan(read[-1])
PYTHON
cd "$work"
"$python" -W ignore finding.py
