#!/usr/bin/env bash
# Guess: rs_lora puts its factor into the alpha of the file, so that alpha / rank is right for every file, as it is for LoCon.
# Seen, lycoris-lora 4.1.3: not for LoKr whose factors are whole (a rank of at least half of a factor's side, or
# full_matrix). It was trained with sqrt(rank) times w1 x w2, 10 times at rank 100; the file has w1, w2 and alpha 1000, no
# rank, and LyCORIS itself, loading it, applies it once. With low-rank factors the file is right.
# Costs: such a LoRA is 10 times too weak in everything that loads it, and no reader can know.
# Here: applied once, as LyCORIS and ComfyUI do; its strength is what can be raised.
#
# Output on 2026-11-28:
#   lycoris-lora 4.1.3 torch 2.11.0+cu130
#   LoCon, rank 4, rs_lora False: trained 1.00 times what the file says
#   LoKr, rank 2, rs_lora False: alpha, lokr_w1, lokr_w2_a, lokr_w2_b; alpha 1.00; trained 1.00 times what LyCORIS loads
#   LoKr, rank 100, rs_lora False: alpha, lokr_w1, lokr_w2; alpha 100.00; trained 1.00 times what LyCORIS loads
#   LoCon, rank 4, rs_lora True: trained 1.00 times what the file says
#   LoKr, rank 2, rs_lora True: alpha, lokr_w1, lokr_w2_a, lokr_w2_b; alpha 1.41; trained 1.00 times what LyCORIS loads
#   LoKr, rank 100, rs_lora True: alpha, lokr_w1, lokr_w2; alpha 1000.00; trained 10.00 times what LyCORIS loads
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 lycoris-lora==4.1.3
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import logging
from importlib.metadata import version

import torch

logging.disable(logging.CRITICAL)
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule

FACTORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
NAMES = (*(f"lokr_{name}" for name in FACTORS), "alpha", "dora_scale")


def trained(kind, rank, **options):
    """What it changes of a layer while it is trained, and its file."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False)
    base = linear.weight.detach().clone()
    module = kind("x", linear, lora_dim=rank, alpha=1, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    linear.weight.data.copy_(base)
    file = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.apply_to()
    return (linear(torch.eye(64)).T - base).detach(), file


def ratio(a, b):
    return ((a * b).sum() / (b * b).sum()).item()


print("lycoris-lora", version("lycoris-lora"), "torch", torch.__version__)
for rs_lora in (False, True):
    update, file = trained(LoConModule, 4, rs_lora=rs_lora)
    by_file = file["alpha"].item() / 4 * (file["lora_up.weight"] @ file["lora_down.weight"])
    print(f"LoCon, rank 4, rs_lora {rs_lora}: trained {ratio(update, by_file):.2f} times what the file says")
    assert abs(ratio(update, by_file) - 1) < 1e-4
    for rank, expected in ((2, 1), (100, 10 if rs_lora else 1)):
        update, file = trained(LokrModule, rank, factor=4, rs_lora=rs_lora)
        linear = torch.nn.Linear(64, 48, bias=False)
        with torch.no_grad():
            again = LokrModule.make_module_from_state_dict("x", linear, *map(file.get, NAMES))
        base = linear.weight.detach().clone()
        again.apply_to()
        loaded = (linear(torch.eye(64)).T - base).detach()
        found = ratio(update, loaded)
        print(f"LoKr, rank {rank}, rs_lora {rs_lora}: {', '.join(file)}; alpha {file['alpha'].item():.2f}; trained "
              f"{found:.2f} times what LyCORIS loads")
        assert abs(found - expected) < 1e-3
PYTHON
cd "$work"
"$python" -W ignore finding.py
