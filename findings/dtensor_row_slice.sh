#!/usr/bin/env bash
# Guess: writing to a slice of a sharded DTensor changes it, as of every tensor, or raises, as assignment does.
# Seen, torch 2.11.0, a weight [4, 6] sharded by rows over two ranks: w[0:2].fill_(), w[0].zero_(), w[0:2] += 1, narrow,
# chunk and w[0, 0] = 1 return and change nothing: a slice along the sharded dimension is gathered first, and the copy is
# what is written to. The same along the other dimension (w[:, 0:2].fill_(), chunk(2, 1)) writes through;
# w[0:2] = 1 raises.
# Costs: under FSDP2 padding rows are not zeroed and single rows not patched, without an error; that columns can be written
# makes a test of it pass.
# Here: each rank writes the rows that it holds into its local tensor (wan/checkpoint/weights.py).
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   w[0:2].fill_(1): 12 elements of a plain tensor, of a DTensor 0
#   w[0].fill_(1): 6 elements of a plain tensor, of a DTensor 0
#   w[0:2] += 1: 12 elements of a plain tensor, of a DTensor 0
#   w.narrow(0, 0, 2).add_(1): 12 elements of a plain tensor, of a DTensor 0
#   w.chunk(2, 0)[0].fill_(1): 12 elements of a plain tensor, of a DTensor 0
#   w[0, 0] = 1: 1 elements of a plain tensor, of a DTensor 0
#   w[:, 0:2].fill_(1): 8 elements of a plain tensor, of a DTensor 8
#   w.chunk(2, 1)[0].fill_(1): 12 elements of a plain tensor, of a DTensor 12
#   w[0:2] = 1: 12 elements of a plain tensor, of a DTensor NotImplementedError
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RANKS = 2


def add_to_rows(w):
    w[0:2] += 1


def set_one(w):
    w[0, 0] = 1


def set_rows(w):
    w[0:2] = 1


WRITES = {
    "w[0:2].fill_(1)": (lambda w: w[0:2].fill_(1), 12, 0),
    "w[0].fill_(1)": (lambda w: w[0].fill_(1), 6, 0),
    "w[0:2] += 1": (add_to_rows, 12, 0),
    "w.narrow(0, 0, 2).add_(1)": (lambda w: w.narrow(0, 0, 2).add_(1), 12, 0),
    "w.chunk(2, 0)[0].fill_(1)": (lambda w: w.chunk(2, 0)[0].fill_(1), 12, 0),
    "w[0, 0] = 1": (set_one, 1, 0),
    "w[:, 0:2].fill_(1)": (lambda w: w[:, 0:2].fill_(1), 8, 8),
    "w.chunk(2, 1)[0].fill_(1)": (lambda w: w.chunk(2, 1)[0].fill_(1), 12, 12),
    "w[0:2] = 1": (set_rows, 12, "NotImplementedError"),
}


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    if rank == 0:
        print("torch", torch.__version__)
    for name, (write, expected, seen) in WRITES.items():
        plain, sharded = torch.zeros(4, 6), distribute_tensor(torch.zeros(4, 6), mesh, [Shard(0)])
        write(plain)
        try:
            write(sharded)
            found = int(sharded.full_tensor().sum())
        except NotImplementedError as error:
            found = type(error).__name__
        if rank == 0:
            print(f"{name}: {int(plain.sum())} elements of a plain tensor, of a DTensor {found}")
        assert (int(plain.sum()), found) == (expected, seen), name
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
