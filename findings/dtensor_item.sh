#!/usr/bin/env bash
# Guess: .item() of a sum over a sharded DTensor is the sum, as max().full_tensor() is the maximum; or it raises.
# Seen, torch 2.13.0 (2.11.0 too), 5 rows over three ranks: sum().item() and float(norm()) give each rank the value of
# its own rows, without an error; isnan().any() is true only on the rank whose row holds the NaN.
# Costs: under FSDP2 a logged gradient norm or a check for NaN differs from rank to rank: some stop, the others wait.
# Here: weights under FSDP2 are only used inside the model; nothing asks a DTensor for a number.
#
# Output on 2026-11-28:
#   torch 2.13.0+cpu - right: 45.0 16.882 True
#   sum().item() on each rank: [6.0, 22.0, 17.0]
#   float(norm()) on each rank: [3.742, 11.225, 12.042]
#   bool(isnan().any()) on each rank: [False, False, True]
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RANKS = 3


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=RANKS)

    mesh = init_device_mesh("cpu", (RANKS,))
    whole = torch.arange(10.0).reshape(5, 2)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    damaged = whole.clone()
    damaged[4, 1] = float("nan")
    mine = {
        "sum().item()": sharded.sum().item(),
        "float(norm())": round(float(sharded.norm()), 3),
        "bool(isnan().any())": bool(distribute_tensor(damaged, mesh, [Shard(0)]).isnan().any()),
    }
    total = sharded.sum().full_tensor().item()
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        print("torch", torch.__version__, "- right:", total, round(whole.norm().item(), 3), True)
        for name in mine:
            print(name, "on each rank:", [other[name] for other in everyone])
    assert total == 45.0
    assert [other["sum().item()"] for other in everyone] == [6.0, 22.0, 17.0]
    assert len({other["float(norm())"] for other in everyone}) == RANKS
    assert [other["bool(isnan().any())"] for other in everyone] == [False, False, True]
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
