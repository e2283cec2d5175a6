#!/usr/bin/env bash
# Guess: a weight of 4 bits by groups is its codebook's level times its group's scale times its row's scale.
# Seen: with comfy-kitchen 0.2.40, asym_w4a8_int8 rounds level times group's scale to whole numbers of -127 to 127 first,
# in every path: dequantised values are those int8 codes times the row's scale. Many different levels of a group with a
# small scale so become the same number.
# Costs: a reader that multiplies the three gets other values than ComfyUI, by up to half of a row's scale, and in groups
# with small scales by most of the value.
# Here: the int8 codes are made as there, and kept exactly.
#
# Output on 2026-11-29:
#   comfy-kitchen 0.2.40 torch 2.13.0+cpu
#   rounded in between: the same values; not rounded: 20.3% off in groups with small scales
#   different values in such a group of 16: 5 to 13, 3 to 10 once rounded
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

import comfy_kitchen
import torch

GROUP, ROTATED = 16, 16
print("comfy-kitchen", version("comfy-kitchen"), "torch", torch.__version__)
torch.manual_seed(0)
# A row with large values in its first group and small ones in the others, as trained weights have outliers.
weight = torch.randn(64, 256)
weight[:, GROUP:] /= 40
packed, groups, rows, _, levels = comfy_kitchen.quantize_w4a8_int8_weight(weight, GROUP, ROTATED)
stored = comfy_kitchen.dequantize_w4a8_int8_weight(packed, groups, rows, levels, None, GROUP, ROTATED, torch.float32)

# The rotation is its own inverse: of each 16 inputs by the normalised regular Hadamard matrix of that size.
four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
turn = torch.block_diag(*[torch.kron(four, four) / 4] * (256 // ROTATED))
bytes_ = packed.view(torch.uint8)
places = torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1).int()
product = levels[places] * groups.float().repeat_interleave(GROUP, dim=1)
guessed = (product * rows[:, None]) @ turn
rounded = (product.round().clamp(-127, 127) * rows[:, None]) @ turn
torch.testing.assert_close(rounded, stored, rtol=1e-4, atol=1e-6)
apart = (guessed - stored)[:, GROUP:].norm() / stored[:, GROUP:].norm()
assert apart > 0.02, apart
print(f"rounded in between: the same values; not rounded: {apart:.1%} off in groups with small scales")
different = {len(set(part.tolist())) for part in product[:, GROUP:].unflatten(1, (-1, GROUP)).flatten(0, 1)}
kept = {len(set(part.tolist())) for part in product[:, GROUP:].round().unflatten(1, (-1, GROUP)).flatten(0, 1)}
print(f"different values in such a group of {GROUP}: {min(different)} to {max(different)}, {min(kept)} to {max(kept)} once rounded")
PYTHON
cd "$work"
"$python" -W ignore finding.py
