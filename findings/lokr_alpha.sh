#!/usr/bin/env bash
# Guess: the same two factors of a LoKr and the same alpha mean the same update in peft and in LyCORIS.
# Seen: where both factors are full matrices (a large rank), LyCORIS 4.1.3 takes alpha for the rank, whatever was set, so
# the update is kron(w1, w2). peft 0.21.2 multiplies it by alpha / r: with r 1000 and alpha 8 by 0.008.
# Costs: a converter that copies w1, w2 and alpha makes a LoKr of another strength, here 125 times weaker or stronger.
# Here: by the file: with alpha in it as LyCORIS, with the settings beside it as peft (wan/lora/lora.py).
#
# Output on 2026-11-28:
#   peft 0.21.2 lycoris-lora 4.1.3 torch 2.13.0+cpu
#   rank 1000, alpha 1: peft 0.001 * kron(w1, w2), LyCORIS 1.000, its stored alpha 1000
#   rank 1000, alpha 8: peft 0.008 * kron(w1, w2), LyCORIS 1.000, its stored alpha 1000
#   rank 1000, alpha 64: peft 0.064 * kron(w1, w2), LyCORIS 1.000, its stored alpha 1000
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
from peft import LoKrConfig, get_peft_model

logging.disable(logging.WARNING)
from lycoris.modules.lokr import LokrModule

RANK = 1000


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return self.inner(x)


print("peft", version("peft"), "lycoris-lora", version("lycoris-lora"), "torch", torch.__version__)
for alpha in (1, 8, 64):
    model = get_peft_model(Layer(), LoKrConfig(r=RANK, alpha=alpha, target_modules=["inner"]))
    layer = model.base_model.model.inner
    first, second = layer.lokr_w1["default"], layer.lokr_w2["default"]
    torch.nn.init.normal_(first), torch.nn.init.normal_(second)
    whole = torch.kron(first, second)
    peft = (layer.get_delta_weight("default").norm() / whole.norm()).item()

    linear = torch.nn.Linear(64, 48, bias=False)
    module = LokrModule("x", linear, lora_dim=RANK, alpha=alpha)
    assert module.lokr_w1.shape == first.shape and module.lokr_w2.shape == second.shape
    module.lokr_w1.data, module.lokr_w2.data = first.data, second.data
    update = module.get_merged_weight(1.0)[0] - linear.weight
    lycoris = (update.norm() / whole.norm()).item()
    print(f"rank {RANK}, alpha {alpha}: peft {peft:.3f} * kron(w1, w2), LyCORIS {lycoris:.3f}, its stored alpha "
          f"{module.alpha.item():g}")
    assert abs(peft - alpha / RANK) < 1e-4 and abs(lycoris - 1) < 1e-4
PYTHON
cd "$work"
"$python" -W ignore finding.py
