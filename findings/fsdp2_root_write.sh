#!/usr/bin/env bash
# Guess: weights of a fully_shard model are DTensors between forwards; what is written to them in place is what they are.
# Seen, torch 2.11.0: not the root's own weights (those in no group of their own). fully_shard leaves them gathered after
# a forward, plain Parameters: a LoRA merged into them in place is used by the next forward (32 in place of 16), but
# state_dict() does not have it, and takes it away: it drops the gathered copy, and the forward behind it gives 16
# again. The same holds for all groups with reshard_after_forward=False. With True for the root too, or reshard() before the
# write, it is kept.
# Costs: looking at a model (saving it, comparing it) changes what it computes, and the saved file lacks the change.
# Here: the root drops what it gathers as the blocks do, and what is kept for an expert is let go before a job ends, so
# that weights are sharded where they are written (distributed/parallel/parallelize.py).
#
# Output on 2026-11-28:
#   torch 2.11.0+cu130
#   a group's: DTensor; forward 16, doubled 32, state_dict has 2, then 32
#   the root's: Parameter; forward 16, doubled 32, state_dict has 1, then 16
#   the root's, resharded before: DTensor; forward 16, doubled 32, state_dict has 2, then 32
#   the root's, reshard_after_forward=True: DTensor; forward 16, doubled 32, state_dict has 2, then 32
#   a group's, reshard_after_forward=False: Parameter; forward 16, doubled 32, state_dict has 1, then 16
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


def model(mesh, **options):
    """Two layers of ones; the first is a group, the second the root's."""
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for weight in layers.parameters():
        nn.init.ones_(weight)
    fully_shard(layers[0], mesh=mesh, **options)
    fully_shard(layers, mesh=mesh, **options)
    return layers


@torch.no_grad()
def doubled(layers, number, resharded=False):
    """What the weight is after a forward; forwards before, after it is doubled, and after state_dict(); what that says."""
    x = torch.ones(1, 4)
    values = [layers(x)[0, 0].item()]
    if resharded:
        layers.reshard()
    weight = layers[number].weight
    weight.mul_(2)
    values.append(layers(x)[0, 0].item())
    saved = layers.state_dict()[f"{number}.weight"].full_tensor()[0, 0].item()
    values.append(layers(x)[0, 0].item())
    return type(weight).__name__, values, saved


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath('store')}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, layers, number, resharded in (
        ("a group's", model(mesh), 0, False), ("the root's", model(mesh), 1, False),
        ("the root's, resharded before", model(mesh), 1, True),
        ("the root's, reshard_after_forward=True", model(mesh, reshard_after_forward=True), 1, False),
        ("a group's, reshard_after_forward=False", model(mesh, reshard_after_forward=False), 0, False),
    ):
        kind, values, saved = doubled(layers, number, resharded)
        if rank == 0:
            print(f"{name}: {kind}; forward {values[0]:g}, doubled {values[1]:g}, state_dict has {saved:g}, then {values[2]:g}")
        lost = name in ("the root's", "a group's, reshard_after_forward=False")
        assert (kind, values, saved) == (("Parameter", [16, 32, 16], 1) if lost else ("DTensor", [16, 32, 32], 2)), name
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
