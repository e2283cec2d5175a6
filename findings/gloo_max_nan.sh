#!/usr/bin/env bash
# Guess: all_reduce with MAX or MIN keeps a NaN, as torch.max does, or drops it, the same in every element.
# Seen, torch 2.13.0 (2.11.0 too), gloo, three ranks with 0, 1, 2, one of them all NaN: part of the elements are NaN, the
# others not, by their place in the tensor. Where the NaN is lost, a larger number may be lost with it: of 0, NaN, 2 the
# maximum becomes 0.
# Costs: a check "did anybody see a NaN" by MAX passes on a CPU though one rank has seen one, and a largest value is not
# the largest.
# Here: ranks gather latents and look at them themselves (distributed/rank/worker.py); nothing is reduced by MAX or MIN.
#
# Output on 2026-11-28:
#   torch 2.13.0+cpu, MAX of 0, 1, 2 with NaN on rank 0: [nan, nan, nan, nan, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
#   torch 2.13.0+cpu, MAX of 0, 1, 2 with NaN on rank 1: [0.0, 0.0, 0.0, 0.0, nan, nan, nan, nan, 2.0, 2.0, 2.0, 2.0]
#   torch 2.13.0+cpu, MAX of 0, 1, 2 with NaN on rank 2: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, nan, nan, nan, nan]
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
NAN = float("nan")


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=RANKS)

    lost = set()
    for holder in range(RANKS):
        value = torch.full((12,), NAN if rank == holder else float(rank))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"torch {torch.__version__}, MAX of 0, 1, 2 with NaN on rank {holder}:", value.tolist())
        assert value.isnan().any() and not value.isnan().all()
        largest = max(other for other in range(RANKS) if other != holder)
        lost.update((holder, number) for number in value[~value.isnan()].tolist() if number < largest)
    assert (1, 0.0) in lost
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
