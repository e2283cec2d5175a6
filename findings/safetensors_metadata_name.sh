#!/usr/bin/env bash
# Guess: save_file refuses a name that it could not read again, or reads it again.
# Seen, safetensors 0.8.0: a tensor called __metadata__ is written without an error into the place of the file's notes.
# Then nothing can be read of the file, no other tensor either: load_file and safe_open raise "invalid JSON in header".
# Beside notes of its own (metadata=) the header has the name twice, and the same happens.
# Costs: a state dict with such a buffer is lost, and that is noticed when it is wanted again.
# Here: names of tensors that are written are the pack's own.
#
# Output on 2026-11-28:
#   safetensors 0.8.0 torch 2.13.0+cpu
#   notes None: save_file done; load_file SafetensorError; the other tensor SafetensorError
#   notes {'format': 'pt'}: save_file done; load_file SafetensorError; the other tensor SafetensorError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

print("safetensors", version("safetensors"), "torch", torch.__version__)


def opened(path):
    with safe_open(path, "pt") as file:
        return file.get_tensor("weight")


def tried(action):
    try:
        action()
    except SafetensorError as error:
        assert "invalid JSON in header" in str(error)
        return "SafetensorError"
    return "done"


tensors = {"weight": torch.ones(3), "__metadata__": torch.arange(4.0)}
for notes in (None, {"format": "pt"}):
    seen = [
        tried(lambda: save_file(tensors, "w.safetensors", metadata=notes)), tried(lambda: load_file("w.safetensors")),
        tried(lambda: opened("w.safetensors")),
    ]
    print(f"notes {notes}: save_file {seen[0]}; load_file {seen[1]}; the other tensor {seen[2]}")
    assert seen[0] == "done" and seen[1:] == ["SafetensorError"] * 2
save_file({"weight": torch.ones(3), "metadata": torch.arange(4.0)}, "w.safetensors")
assert torch.equal(opened("w.safetensors"), torch.ones(3))
PYTHON
cd "$work"
"$python" -W ignore finding.py
