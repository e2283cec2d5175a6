#!/usr/bin/env bash
# Guess: merging an adapter gives the weight of the layer that was trained.
# Seen: in LyCORIS 4.1.3 LoHa and LoKr are trained with alpha / rank times their update, but `get_merged_weight` multiplies
# by alpha / rank twice. A plain LoRA (LoCon) of the same library is merged as it was trained.
# Costs: a model merged with it is weaker (alpha below the rank) or stronger than what the trainer showed: with alpha 1 and
# rank 8 by a factor of 8.
# Here: alpha / rank once, as the trained layer and ComfyUI have it (wan/lora/families.py).
#
# Output on 2026-11-28:
#   lycoris-lora 4.1.3 torch 2.13.0+cpu
#   LoHa, rank 8, alpha 1: merged update / trained update 0.125
#   LoHa, rank 8, alpha 16: merged update / trained update 2.000
#   LoKr, rank 8, alpha 1: merged update / trained update 0.125
#   LoKr, rank 8, alpha 16: merged update / trained update 2.000
#   LoCon, rank 8, alpha 1: merged update / trained update 1.000
#   LoCon, rank 8, alpha 16: merged update / trained update 1.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lycoris-lora==4.1.3
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import logging
from importlib.metadata import version

import torch

logging.disable(logging.WARNING)
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

print("lycoris-lora", version("lycoris-lora"), "torch", torch.__version__)
torch.manual_seed(0)
torch.set_grad_enabled(False)
seen = []
for name, kind, more in (("LoHa", LohaModule, {}), ("LoKr", LokrModule, {"factor": 4}), ("LoCon", LoConModule, {})):
    for alpha in (1, 16):
        linear = torch.nn.Linear(256, 256, bias=False)
        module = kind("x", linear, lora_dim=8, alpha=alpha, **more).eval()
        for parameter in module.parameters():
            parameter.data.normal_()
        x = torch.eye(256)
        trained = module(x).T - linear.weight
        merged = module.get_merged_weight(1.0)[0] - linear.weight
        ratio = ((merged * trained).sum() / trained.square().sum()).item()
        assert (merged - ratio * trained).norm() < 1e-4 * merged.norm(), "of the same direction"
        seen.append(round(ratio, 3))
        print(f"{name}, rank 8, alpha {alpha}: merged update / trained update {ratio:.3f}")
assert seen == [0.125, 2.0, 0.125, 2.0, 1.0, 1.0], seen
PYTHON
"$python" "$work/finding.py" 2>/dev/null
