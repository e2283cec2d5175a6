#!/usr/bin/env bash
# Runs the pack with the oldest or the newest packages that requirements.txt allows: tests/versions.sh oldest|newest
# In an environment of its own, in a temporary folder that is removed; pip's settings (an index of CPU wheels) hold.
set -euo pipefail
cd "$(dirname "$0")/.."
case $1 in
    oldest) resolution=lowest-direct ;;
    newest) resolution=highest ;;
    *) echo "tests/versions.sh oldest|newest" >&2; exit 2 ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" -m pip install --quiet uv
"$folder/venv/bin/uv" pip install --quiet --python "$python" --resolution "$resolution" \
    -r requirements.txt "gguf>=0.10"
# DeepSpeed's setup wants torch, and what its build needs, in the environment.
"$folder/venv/bin/uv" pip install --quiet --python "$python" setuptools wheel ninja numpy packaging
"$folder/venv/bin/uv" pip install --quiet --python "$python" --resolution "$resolution" --no-build-isolation \
    -r requirements.txt -r requirements-deepspeed.txt "gguf>=0.10"
HOME=$folder OMP_NUM_THREADS=1 "$python" tests/versions.py imports golden job
# ComfyUI has torchaudio as well, which transformers imports where it is, and which is made for one torch.
torch=$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')
"$folder/venv/bin/uv" pip install --quiet --no-deps --python "$python" "torchaudio==$torch" 2>/dev/null ||
    "$folder/venv/bin/uv" pip install --quiet --no-deps --python "$python" torchaudio
echo "with torchaudio:"
HOME=$folder "$python" tests/versions.py imports || echo "(no torchaudio is made for torch $torch: the sentence above is what a user reads)"
