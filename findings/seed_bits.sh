#!/usr/bin/env bash
# Guess: two seeds of 64 bits are two noises.
# Seen, torch 2.11.0 and 2.13.0, CPU: only the lower 32 bits of a seed start the generator. 7 and 7 + 2**32 give the same
# numbers, and so does every other of the 2**32 seeds that end alike; initial_seed() says the whole seed all the same. -1 is
# 2**64 - 1 and 2**32 - 1. NumPy and a CUDA generator use all of it.
# Costs: 64-bit seeds, as ComfyUI's widget draws them, are 4 billion noises, and seeds made as number * 2**32 are one.
# Here: the noise is the CPU's, so the same holds (docs/nodes.md).
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130 numpy 2.4.6
#   seed 8: another noise, initial_seed() 8
#   seed 2147483655: another noise, initial_seed() 2147483655
#   seed 4294967303: the noise of 7, initial_seed() 4294967303
#   seed 5497558138887: the noise of 7, initial_seed() 5497558138887
#   seed 9223372036854775815: the noise of 7, initial_seed() 9223372036854775815
#   NumPy's 7 and 7 + 2**32 differ
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
import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__)


def noise(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1000, generator=generator), generator.initial_seed()


first, _ = noise(7)
for seed in (8, 7 + 2**31, 7 + 2**32, 7 + 5 * 2**40, 2**63 + 7):
    other, told = noise(seed)
    print(f"seed {seed}: {'the noise of 7' if torch.equal(first, other) else 'another noise'}, initial_seed() {told}")
    assert torch.equal(first, other) == (seed % 2**32 == 7) and told == seed
assert torch.equal(noise(-1)[0], noise(2**32 - 1)[0]) and torch.equal(noise(-1)[0], noise(2**64 - 1)[0])
drawn = [np.random.default_rng(seed).standard_normal(1000) for seed in (7, 7 + 2**32)]
assert not np.array_equal(*drawn)
print("NumPy's 7 and 7 + 2**32 differ")
PYTHON
cd "$work"
"$python" -W ignore finding.py
