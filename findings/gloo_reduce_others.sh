#!/usr/bin/env bash
# Guess: reduce(tensor, dst=0) gives rank 0 the sum and leaves the others' tensors alone, as NCCL does.
# Seen, torch 2.11.0, gloo, three ranks with 1, 2 and 3: rank 0 has 6, and ranks 1 and 2 are left with partial sums, 5 and 3,
# in place of what they had; in float32, integers and bf16 alike. With four ranks it is 10, 9, 7 and 4.
# Costs: a loss or a count that is reduced for the log of rank 0 is wrong on the other ranks from then on; the same code
# is right on GPUs.
# Here: nothing is reduced to one rank.
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   3 ranks, torch.float32: [6.0, 5.0, 3.0]
#   3 ranks, torch.bfloat16: [6.0, 5.0, 3.0]
#   3 ranks, torch.int64: [6, 5, 3]
#   4 ranks, torch.float32: [10.0, 9.0, 7.0, 4.0]
#   4 ranks, torch.bfloat16: [10.0, 9.0, 7.0, 4.0]
#   4 ranks, torch.int64: [10, 9, 7, 4]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import os

import torch
import torch.distributed as dist


def run(rank, ranks, seen):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath(str(ranks))}", rank=rank, world_size=ranks)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.full((2,), rank + 1, dtype=dtype)
        dist.reduce(tensor, dst=0)
        everyone = [None] * ranks
        dist.all_gather_object(everyone, tensor.tolist())
        if rank == 0:
            print(f"{ranks} ranks, {dtype}: {[values[0] for values in everyone]}")
        assert [values[0] for values in everyone] == seen
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    for ranks, seen in ((3, [6, 5, 3]), (4, [10, 9, 7, 4])):
        torch.multiprocessing.spawn(run, (ranks, seen), nprocs=ranks)
PYTHON
cd "$work"
"$python" -W ignore finding.py
