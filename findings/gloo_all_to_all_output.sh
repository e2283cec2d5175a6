#!/usr/bin/env bash
# Guess: all_to_all_single takes a transposed output, or refuses it, as it refuses a transposed input.
# Seen, torch 2.13.0 (2.11.0 too), gloo: the input is refused ("Tensors must be contiguous"), the output is taken and
# filled in the order of its memory: right numbers in wrong places, no error. broadcast and all_reduce do handle
# transposed tensors.
# Costs: a sequence exchange that receives into a view, such as [heads, tokens] transposed, mixes heads and tokens.
# Here: everything is received into fresh flat buffers (distributed/parallel/ulysses.py, distributed/parallel/image_rows.py).
#
# Output on 2026-11-28:
#   torch 2.13.0+cpu
#   contiguous output [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]
#   transposed output [[0.0, 2.0, 11.0], [1.0, 10.0, 12.0]]
#   transposed input: Tensors must be contiguous
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

RANKS = 2


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=RANKS)

    sent = torch.arange(RANKS * 3.0).reshape(RANKS, 3) + 10 * rank
    plain = torch.empty(RANKS, 3)
    dist.all_to_all_single(plain, sent)
    view = torch.empty(3, RANKS).t()
    dist.all_to_all_single(view, sent)
    try:
        dist.all_to_all_single(torch.empty(RANKS, 3), torch.empty(3, RANKS).t())
    except ValueError as error:
        refused = str(error)
    value = torch.full((3, RANKS), float(rank)).t()
    dist.broadcast(value, 0)
    if rank == 0:
        print("torch", torch.__version__)
        print("contiguous output", plain.tolist())
        print("transposed output", view.tolist())
        print("transposed input:", refused)
    assert "contiguous" in refused and not value.any()
    assert not torch.equal(view, plain) and torch.equal(view.t().reshape(-1), plain.reshape(-1))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, nprocs=RANKS)
PYTHON
cd "$work"
"$python" -W ignore finding.py
