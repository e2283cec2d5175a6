#!/usr/bin/env bash
# Guess: the sum of the same three bfloat16 numbers is the same in every element of a tensor.
# Seen, torch 2.13.0 (2.11.0 too), gloo, three ranks with 256, 1 and 1: the first elements become 258, the others 256.
# Where a rank's piece of the ring begins decides which numbers are added first; every addition is rounded to bfloat16.
# All ranks have the same bits.
# Costs: a result that is reduced in bfloat16 depends on where in the tensor, so on how it was padded or split, a value
# lies; "equal bits for another number of processes" cannot hold.
# Here: nothing is summed over processes; sequences are gathered and exchanged as they are (distributed/parallel/ulysses.py).
#
# Output on 2026-11-28:
#   torch 2.13.0+cpu
#   256 + 1 + 1 in 16 elements: [258.0, 258.0, 258.0, 258.0, 258.0, 258.0, 256.0, 256.0, 256.0, 256.0, 256.0, 256.0, 256.0, 256.0, 256.0, 256.0]
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
import os

import torch
import torch.distributed as dist

RANKS = 3


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=RANKS)

    value = torch.full((16,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    dist.all_reduce(value)
    everyone = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(everyone, value)
    if rank == 0:
        print("torch", torch.__version__)
        print("256 + 1 + 1 in 16 elements:", value.tolist())
    assert set(value.tolist()) == {256.0, 258.0}
    assert all(torch.equal(other, value) for other in everyone)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
