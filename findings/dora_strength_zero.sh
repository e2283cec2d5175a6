#!/usr/bin/env bash
# Guess: a DoRA at strength 0 is the model without it, in every library.
# Seen: peft 0.21.2 with its scale at 0 keeps the learned lengths of the rows (here 20 % off the base). LyCORIS 4.1.3,
# merged with multiplier 0, adds the whole low-rank update instead: its multiplier only fades the lengths.
# Costs: a slider at 0, or faded out over the steps, gives two different models, and neither is the base.
# Here: a line between W and the whole change; a LoRA of strength 0 is not even opened (wan/lora/dora.py).
#
# Output on 2026-11-28:
#   peft 0.21.2 lycoris-lora 4.1.3 torch 2.13.0+cpu
#   peft, scale 0: 0.200 off the base
#   LyCORIS, multiplier 0: 0.523 off the base, 0e+00 off base + whole update
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
from peft import LoraConfig, get_peft_model

logging.disable(logging.WARNING)
from lycoris.modules.locon import LoConModule


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return self.inner(x)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


print("peft", version("peft"), "lycoris-lora", version("lycoris-lora"), "torch", torch.__version__)
torch.manual_seed(0)
layer = Layer()
base = layer.inner.weight.detach().clone()
model = get_peft_model(layer, LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["inner"]))
for name, parameter in model.named_parameters():
    if "magnitude" in name:
        parameter.data *= 1.2
    elif "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.1)
model.base_model.model.inner.set_scale("default", 0.0)
peft = difference(model.eval()(torch.eye(64)).T.detach(), base)

torch.manual_seed(0)
linear = torch.nn.Linear(64, 48, bias=False)
base = linear.weight.detach().clone()
module = LoConModule("x", linear, lora_dim=4, alpha=8, weight_decompose=True)
for parameter in (module.lora_up.weight, module.lora_down.weight):
    torch.nn.init.normal_(parameter, std=0.1)
update = 2 * (module.lora_up.weight @ module.lora_down.weight).detach()
at_zero = module.get_merged_weight(0.0)[0].detach()
print(f"peft, scale 0: {peft:.3f} off the base")
print(f"LyCORIS, multiplier 0: {difference(at_zero, base):.3f} off the base, {difference(at_zero, base + update):.0e} "
      f"off base + whole update")
assert abs(peft - 0.2) < 1e-3
assert difference(at_zero, base) > 0.3 and difference(at_zero, base + update) < 1e-6
PYTHON
cd "$work"
"$python" -W ignore finding.py
