#!/usr/bin/env bash
# Guess: an operator declared by torch.library.custom_op and called where nothing is compiled just runs its function.
# Seen, torch 2.11.0 and 2.13.0: the first call of such an operator in a process imports torch's compiler, a thousand
# modules and more than half a second here, and sympy with it; so does @torch.compiler.disable, when a module that has it is
# imported. The same function declared by torch.library.Library.impl imports nothing.
# Costs: FlashAttention-3's wheels call their kernel through such an operator, and diffusers decorates with the other: on the
# host of an H200, beside threads that read weights, 2.4 to 2.9 s of a cold start.
# Here: the kernel's own operator is called, and diffusers is imported without the compiler (wan/model/attention.py,
# distributed/libraries/library_imports.py).
#
# Output on 2026-11-29, two CPU cores (2.11.0 gave the same lines):
#   torch 2.13.0+cpu
#   custom_op: the compiler is imported when declared: False, when called: True
#   torch 2.13.0+cpu
#   disable: the compiler is imported when declared: True, when called: True
#   torch 2.13.0+cpu
#   Library.impl: the compiler is imported when declared: False, when called: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import sys

import torch
from torch import Tensor

print("torch", torch.__version__)
way = sys.argv[1]
if way == "custom_op":

    @torch.library.custom_op("mine::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

elif way == "Library.impl":
    library = torch.library.Library("mine", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
else:

    @torch.compiler.disable
    def twice(x: Tensor) -> Tensor:
        return x * 2


def compiler() -> bool:
    return "torch._dynamo" in sys.modules


declared, before = compiler(), len(sys.modules)
with torch.no_grad():
    out = twice(torch.ones(3)) if way == "disable" else torch.ops.mine.twice(torch.ones(3))
assert out.tolist() == [2, 2, 2]
print(f"{way}: the compiler is imported when declared: {declared}, when called: {compiler()}")
if way == "custom_op":
    assert not declared and compiler() and len(sys.modules) - before > 500 and "sympy" in sys.modules
elif way == "disable":
    assert declared
else:
    assert not compiler()
PYTHON
cd "$work"
for way in custom_op disable Library.impl; do
    "$python" -W ignore finding.py $way
done
