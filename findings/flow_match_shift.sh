#!/usr/bin/env bash
# Guess: FlowMatchEulerDiscreteScheduler(shift=8), set_shift(8) on a fresh one, and what save_config writes of either are
# one list of noise levels: Wan's own, 8 s / (1 + 7 s).
# Seen, diffusers 0.42.1: three lists, none of them Wan's. With the constructor the last of 20 levels is 0.060 (the smallest
# level is shifted there, and again with the list), with set_shift 0.008, and Wan's is 0.296: its levels are even from 1 to
# 0, these from 1 to a thousandth. set_shift is not in the config: saved and loaded the scheduler has shift 1.
# Costs: the "same" shift gives three videos; the last steps are spent where Wan's solvers take one.
# Here: the official list (wan/sampling/schedule.py), whichever solver runs it.
#
# Output on 2026-11-28:
#   diffusers 0.42.1 torch 2.11.0+cu130
#   shift=8: the last of 20 levels are [0.5032, 0.3387, 0.0602]
#   set_shift(8): the last of 20 levels are [0.4872, 0.3117, 0.0079]
#   set_shift(8), saved and loaded: the last of 20 levels are [0.1062, 0.0536, 0.001]
#   Wan's own: the last of 20 levels are [0.5854, 0.4706, 0.2963]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 diffusers==0.42.1
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

STEPS, SHIFT = 20, 8.0


def last_levels(scheduler):
    scheduler.set_timesteps(STEPS)
    return [round(level.item(), 4) for level in scheduler.sigmas[-4:-1]]


built = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
told = FlowMatchEulerDiscreteScheduler()
told.set_shift(SHIFT)
told.save_config("saved")
even = torch.linspace(1, 0, STEPS + 1)[-4:-1]
seen = {
    "shift=8": last_levels(built),
    "set_shift(8)": last_levels(told),
    "set_shift(8), saved and loaded": last_levels(FlowMatchEulerDiscreteScheduler.from_pretrained("saved")),
    "Wan's own": [round(level, 4) for level in (SHIFT * even / (1 + (SHIFT - 1) * even)).tolist()],
}
print("diffusers", diffusers.__version__, "torch", torch.__version__)
for name, levels in seen.items():
    print(f"{name}: the last of {STEPS} levels are {levels}")
assert [levels[-1] for levels in seen.values()] == [0.0602, 0.0079, 0.001, 0.2963]
assert told.config.shift == 1.0
PYTHON
cd "$work"
"$python" -W ignore finding.py
