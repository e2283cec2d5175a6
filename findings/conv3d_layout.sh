#!/usr/bin/env bash
# Guess: a convolution of channels-last input and weight gives channels last, whatever the sizes: that is what one lays them
# out for.
# Seen, torch 2.11.0 and 2.13.0, CPU: conv2d does, and so does conv3d in bfloat16. conv3d in float32 does for two videos, and
# for one that is large enough; for a smaller one it gives channels first. In float64 it never gives channels last. So the
# same line yields another layout for a smaller picture or the last video of a batch; the numbers are the same.
# Costs: what reads the result by its strides (a kernel, view, as_strided) is right in tests and wrong elsewhere, or each
# step pays for a copy.
# Here: every result is asked for channels last before its memory is read (wan/vae/vae_layers.py), a copy only where it is not.
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   conv3d, float32, one of 4x32x32: channels first
#   conv3d, float32, two of 4x32x32: channels last
#   conv3d, float32, one of 6x64x64: channels last
#   conv3d, bfloat16, one of 4x32x32: channels last
#   conv3d, bfloat16, two of 4x32x32: channels last
#   conv3d, bfloat16, one of 6x64x64: channels last
#   conv3d, float64, one of 4x32x32: channels first
#   conv3d, float64, two of 4x32x32: channels first
#   conv3d, float64, one of 6x64x64: channels first
#   conv2d: channels last, in all of these
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
import torch
import torch.nn.functional as F

torch.set_num_threads(2)
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
SIZES = {"one of 4x32x32": (1, 4, 32), "two of 4x32x32": (2, 4, 32), "one of 6x64x64": (1, 6, 64)}
CHANNELS = 96


def layout(shape, dtype):
    """Of what a 3x3 or 3x3x3 convolution gives."""
    form = LAYOUTS[len(shape)]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=form)
    weight = torch.randn(CHANNELS, CHANNELS, *[3] * (len(shape) - 2)).to(dtype).contiguous(memory_format=form)
    y = (F.conv2d if len(shape) == 4 else F.conv3d)(x, weight, padding=1)
    return "channels last" if y.is_contiguous(memory_format=form) else "channels first"


print("torch", torch.__version__)
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for name, (batch, frames, side) in SIZES.items():
        seen[dtype, name] = layout((batch, CHANNELS, frames, side, side), dtype)
        print(f"conv3d, {str(dtype)[6:]}, {name}: {seen[dtype, name]}")
    assert layout((1, CHANNELS, 32, 32), dtype) == "channels last"
print("conv2d: channels last, in all of these")
first, last = "channels first", "channels last"
assert [seen[torch.float32, name] for name in SIZES] == [first, last, last]
assert [seen[torch.bfloat16, name] for name in SIZES] == [last] * 3
assert [seen[torch.float64, name] for name in SIZES] == [first] * 3
PYTHON
cd "$work"
"$python" -W ignore finding.py
