#!/usr/bin/env bash
# Guess: a seed and a shape are one noise: in bf16 it is the float32 one, rounded; how a tensor lies in memory is no matter.
# Seen, torch 2.11.0 on a CPU: torch.randn of one seed in float32, bf16, fp16 and float64 are unrelated numbers
# (no correlation). randn_like of a channels_last tensor, and normal_ of a transposed one, are yet other numbers
# than those of the same shape and seed in usual order. Of sizes that are no multiple of 16 the last 16 are drawn again:
# randn(20) shares 4 numbers with randn(36), randn(32) all with randn(48).
# Costs: a workflow that draws noise in the model's dtype, or like latents that a convolution made, gives another video for
# the same seed, on one machine, without a word.
# Here: noise is drawn in float32, contiguous, on the CPU, whatever the precision (wan/sampling/denoise.py).
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   torch.bfloat16 and float32: correlation 0.001
#   torch.float16 and float32: correlation -0.001
#   torch.float64 and float32: correlation 0.000
#   randn_like, as usual: correlation 1.000
#   randn_like, channels_last: correlation 0.001
#   randn_like, transposed: correlation 0.000
#   randn(32) and the start of randn(48): 32 numbers in common
#   randn(20) and the start of randn(36): 4 numbers in common
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


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1].item()


print("torch", torch.__version__)
noise = draw(16, 21, 60, 104)
assert torch.equal(noise, draw(16, 21, 60, 104))
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    found = correlation(noise, draw(16, 21, 60, 104, dtype=dtype))
    print(f"{dtype} and float32: correlation {found:.3f}")
    assert abs(found) < 0.02
video = torch.empty(1, 16, 21, 60, 104)
for name, like in (
    ("as usual", video),
    ("channels_last", video.to(memory_format=torch.channels_last_3d)),
    ("transposed", torch.empty(1, 16, 21, 104, 60).transpose(3, 4)),
):
    assert like.shape == video.shape
    torch.manual_seed(0)
    found = correlation(noise, torch.randn_like(like))
    print(f"randn_like, {name}: correlation {found:.3f}")
    assert (found > 0.999) == (name == "as usual") and (name == "as usual" or abs(found) < 0.1)
for size, same in ((32, 32), (20, 4)):
    found = int((draw(size) == draw(size + 16)[:size]).sum())
    print(f"randn({size}) and the start of randn({size + 16}): {found} numbers in common")
    assert found == same
PYTHON
cd "$work"
"$python" -W ignore finding.py
