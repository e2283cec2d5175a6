#!/usr/bin/env bash
# Guess: adapter_model.safetensors holds A and B, and W + alpha / r * B @ A is the adapted layer, however A and B began.
# Seen, peft 0.21.2: with init_lora_weights pissa or olora the file of a model that was never trained, added to W, is 50
# to 65 % off W: A and B stand beside a changed W, which is not in the file. peft gets it right by changing W again when
# it loads. With pissa_niter_4 it cannot: the decomposition is random, and its own file is 38 % off after loading.
# Costs: a LoRA merged by the usual formula ruins the model without an error; only adapter_config.json tells.
# Here: was applied like any other; now refused by name, with what to do (wan/lora/alpha.py).
#
# Output on 2026-11-28:
#   peft 0.21.2 torch 2.13.0+cpu
#   True: untrained, W + B @ A is 0.00 off W; loaded by peft again 0.00
#   gaussian: untrained, W + B @ A is 0.00 off W; loaded by peft again 0.00
#   orthogonal: untrained, W + B @ A is 0.00 off W; loaded by peft again 0.00
#   pissa: untrained, W + B @ A is 0.65 off W; loaded by peft again 0.00
#   pissa_niter_4: untrained, W + B @ A is 0.64 off W; loaded by peft again 0.38
#   olora: untrained, W + B @ A is 0.52 off W; loaded by peft again 0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import json
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return self.inner(x)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


print("peft", version("peft"), "torch", torch.__version__)
base, ones = Layer().inner.weight.detach(), torch.eye(64)
seen = {}
for start in (True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"):
    model = get_peft_model(Layer(), LoraConfig(r=8, lora_alpha=8, init_lora_weights=start, target_modules=["inner"]))
    assert difference(model(ones).T, base) < 1e-5
    model.save_pretrained("adapter")
    assert json.load(open("adapter/adapter_config.json"))["init_lora_weights"] == start
    tensors = load_file("adapter/adapter_model.safetensors")
    down, up = (next(tensors[name] for name in tensors if part in name) for part in ("lora_A", "lora_B"))
    layer = Layer()
    torch.manual_seed(7)
    again = difference(PeftModel.from_pretrained(layer, "adapter")(ones).T, base)
    seen[start] = difference(base + up @ down, base), again
    print(f"{start}: untrained, W + B @ A is {seen[start][0]:.2f} off W; loaded by peft again {again:.2f}")
assert all(max(seen[start]) < 1e-5 for start in (True, "gaussian", "orthogonal"))
assert all(seen[start][0] > 0.4 and seen[start][1] < 1e-5 for start in ("pissa", "olora"))
assert min(seen["pissa_niter_4"]) > 0.2
PYTHON
cd "$work"
"$python" -W ignore finding.py
