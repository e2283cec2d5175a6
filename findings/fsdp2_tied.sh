#!/usr/bin/env bash
# Guess: two layers that share a weight share it after fully_shard, or it is refused.
# Seen, torch 2.11.0: only if both are in one group. With a group for each, or one in a group and the other left to the
# root, each gets a copy of its own, without an error or a warning: parameters() has two where it had one, an optimiser's
# first step moves them apart, and a weight written through one name is not what the other layer computes with.
# fully_shard([a, b]) keeps them one.
# Costs: a text encoder or language model, whose embedding is tied, trains or is patched into something else; a file saved
# from it has both.
# Here: a transformer of Wan's ties nothing; the text encoder, which does, is not sharded.
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   both in the root: parameters 3 before, 3 after; equal after a step: True
#   one group of both: parameters 3 before, 3 after; equal after a step: True
#   a group for each: parameters 3 before, 4 after; equal after a step: False
#   one in a group: parameters 3 before, 4 after; equal after a step: False
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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS = 2
GROUPS = {
    "both in the root": lambda model: [],
    "one group of both": lambda model: [[model[0], model[2]]],
    "a group for each": lambda model: [model[0], model[2]],
    "one in a group": lambda model: [model[0]],
}


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath('store')}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, groups in GROUPS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False))
        model[2].weight = model[0].weight
        before = len(list(model.parameters()))
        for group in groups(model):
            fully_shard(group, mesh=mesh)
        fully_shard(model, mesh=mesh)
        after = len(list(model.parameters()))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.tensor([[1, 2]])).square().sum().backward()
        optimiser.step()
        model.reshard()
        same = torch.equal(model[0].weight.full_tensor(), model[2].weight.full_tensor())
        if rank == 0:
            print(f"{name}: parameters {before} before, {after} after; equal after a step: {same}")
        tied = name in ("both in the root", "one group of both")
        assert (before, after, same) == (3, 3 if tied else 4, tied)
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
