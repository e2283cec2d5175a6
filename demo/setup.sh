#!/usr/bin/env bash
# Makes the virtual environment for the demo and the tests: demo/setup.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}

say() { printf '%s\n' "$*" >&2; }

command -v "$python" >/dev/null || { say "python3 is missing. Install it:  sudo apt-get install -y python3 python3-venv"; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "$("$python" --version) is too old: Python 3.10 or newer is needed. Point PYTHON at one:  PYTHON=/path/to/python3.11 make demo"
    exit 1
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || {
    say "Python's venv module is missing. Install it:  sudo apt-get update && sudo apt-get install -y python3-venv"
    exit 1
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
say "Installing into $venv (PyTorch is about 3 GB with its CUDA libraries) ..."
# uv installs the same packages several times faster; pip does without it.
if "$venv/bin/python" -m pip install --quiet uv; then
    install=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
else
    install=("$venv/bin/python" -m pip install --quiet)
fi
comfyui=$("$venv/bin/python" demo/comfyui.py)
grep -E '^torch' requirements-dev.txt >"$venv/constraints.txt"
"${install[@]}" --constraint "$venv/constraints.txt" -r requirements-dev.txt -r "$comfyui/requirements.txt" setuptools wheel ninja
# DeepSpeed's setup looks for torch in the environment, so it comes after it and without an isolated build.
"${install[@]}" --constraint "$venv/constraints.txt" --no-build-isolation -r requirements.txt -r requirements-deepspeed.txt
say "Done."
