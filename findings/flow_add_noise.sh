#!/usr/bin/env bash
# Guess: add_noise of a scheduler with flow sigmas gives (1 - s) x + s n, s = t / 1000, as soon as it exists: training calls it.
# Seen, diffusers 0.42.1: UniPC and DPM-Solver++ do so only behind set_timesteps, and only for its timesteps. Before, their
# levels are those of the diffusion that flow sigmas were to replace: at t = 500, shift 1, the noise is taken 3.42 times and
# the video -2.42 times. Behind set_timesteps(20) a timestep that is none of the 20 is taken for the last of them, in
# silence. Flow-matching Euler's scale_noise is right when it is fresh, and raises for a timestep that it does not have.
# Costs: a LoRA trained with the pipeline's own scheduler learns from noise of the wrong size.
# Here: the formula itself, on the levels of the list that is run.
#
# Output on 2026-11-28:
#   diffusers 0.42.1 torch 2.11.0+cu130
#   UniPC: fresh, at 500: [-2.42, 3.42]; after set_timesteps(20), at 500: [0.5, 0.5], at 333: [0.95, 0.05]
#   DPM-Solver++: fresh, at 500: [-2.42, 3.42]; after set_timesteps(20), at 499: [0.5, 0.5], at 333: [0.95, 0.05]
#   Euler: fresh, at 500: [0.5, 0.5]; after set_timesteps(20), at 474: [0.53, 0.47], at 333: IndexError
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
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
MADE = {
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=1.0),
}


def parts(scheduler, timestep):
    """What is taken of the video and of the noise."""
    one, zero, at = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([timestep], dtype=scheduler.timesteps.dtype)
    try:
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return [round(scheduler.scale_noise(x, at, n).item(), 2) for x, n in ((one, zero), (zero, one))]
        return [round(scheduler.add_noise(x, n, at).item(), 2) for x, n in ((one, zero), (zero, one))]
    except (IndexError, ValueError) as error:
        return type(error).__name__


print("diffusers", diffusers.__version__, "torch", torch.__version__)
seen = {}
for name, make in MADE.items():
    scheduler = make()
    fresh = parts(scheduler, 500)
    scheduler.set_timesteps(20)
    own = scheduler.timesteps[10].item()
    seen[name] = fresh, parts(scheduler, own), parts(scheduler, 333)
    print(f"{name}: fresh, at 500: {fresh}; after set_timesteps(20), at {own:.0f}: {seen[name][1]}, at 333: {seen[name][2]}")
for name in ("UniPC", "DPM-Solver++"):
    assert seen[name] == ([-2.42, 3.42], [0.5, 0.5], [0.95, 0.05]), seen[name]
assert seen["Euler"] == ([0.5, 0.5], [0.53, 0.47], "IndexError")
PYTHON
cd "$work"
"$python" -W ignore finding.py
