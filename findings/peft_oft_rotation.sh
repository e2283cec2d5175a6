#!/usr/bin/env bash
# Guess: OFT turns weights by an exact rotation (Cayley's), and a file means the same in peft and in LyCORIS.
# Seen, peft 0.21.2: OFTConfig's default replaces the inverse in Cayley's formula by five terms of a series. With
# entries of 0.01 the result is a rotation to 3e-5, of 0.1 it is off by 0.3, of 0.3 the weights grow sevenfold. And it
# turns the inputs of a layer (rows keep their length), where LyCORIS 4.1.3 turns the outputs (columns do).
# Costs: a reader that computes the exact rotation, or turns the other side, makes another model from the same file.
# Here: LyCORIS' OFT is merged, peft's and BOFT are refused by name (wan/lora/families.py, module_names.py).
#
# Output on 2026-11-28:
#   peft 0.21.2 lycoris-lora 4.1.3 torch 2.13.0+cpu
#   entries 0.01: off a rotation by 3.0e-05, weights 1.00 times as large; use_cayley_neumann=False: 5e-07
#   entries 0.1: off a rotation by 2.6e-01, weights 0.95 times as large; use_cayley_neumann=False: 4e-07
#   entries 0.3: off a rotation by 2.3e+02, weights 7.80 times as large; use_cayley_neumann=False: 2e-07
#   peft keeps the length of rows, LyCORIS of columns: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 lycoris-lora==4.1.3
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import logging
from importlib.metadata import version

import torch
from peft import OFTConfig, get_peft_model

logging.disable(logging.WARNING)
from lycoris.modules.diag_oft import DiagOFTModule


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return self.inner(x)


def fill(module, size):
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and "org" not in name:
            torch.nn.init.normal_(parameter, std=size)


def lengths_kept(before, after, dim):
    return torch.allclose(before.norm(dim=dim), after.norm(dim=dim), rtol=1e-3)


def merged(size, **options):
    torch.manual_seed(0)
    layer = Layer()
    before = layer.inner.weight.detach().clone()
    model = get_peft_model(layer, OFTConfig(r=0, oft_block_size=16, target_modules=["inner"], **options))
    fill(model, size)
    turn = model.base_model.model.inner.get_delta_weight("default").detach()
    off = (turn @ turn.T - torch.eye(len(turn))).abs().max().item()
    return off, before, model.merge_and_unload().inner.weight.detach()


print("peft", version("peft"), "lycoris-lora", version("lycoris-lora"), "torch", torch.__version__)
off = {}
for size in (0.01, 0.1, 0.3):
    off[size], before, after = merged(size)
    exact, before, turned = merged(size, use_cayley_neumann=False)
    print(f"entries {size}: off a rotation by {off[size]:.1e}, weights {after.norm() / before.norm():.2f} times as "
          f"large; use_cayley_neumann=False: {exact:.0e}")
    assert exact < 1e-5 and lengths_kept(before, turned, 1) and not lengths_kept(before, turned, 0)
assert off[0.01] < 1e-3 and off[0.1] > 0.1 and off[0.3] > 10

torch.manual_seed(0)
linear = torch.nn.Linear(64, 48, bias=False)
module = DiagOFTModule("x", linear, lora_dim=16, alpha=1)
fill(module, 0.1)
after = module.get_merged_weight(1.0)[0].detach()
print("peft keeps the length of rows, LyCORIS of columns:", lengths_kept(linear.weight.detach(), after, 0))
assert lengths_kept(linear.weight.detach(), after, 0) and not lengths_kept(linear.weight.detach(), after, 1)
PYTHON
cd "$work"
"$python" -W ignore finding.py
