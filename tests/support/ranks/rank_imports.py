"""What ranks import, once, before they are forked (forks.py): it takes longer than most of what they do."""

from __future__ import annotations

import gc
import importlib
import os

from kept_memory import keep_freed_memory
from mount import mount_pack

os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
mount_pack()
keep_freed_memory()
for name in (
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
    "wan_pack.distributed.rank.expert",
    "wan_pack.distributed.parallel.split_vae",
    "wan_pack.distributed.rank.worker",
):
    importlib.import_module(name)
# A collection of garbage in a rank would look at all of it, and so have it copied for that rank.
gc.collect()
gc.freeze()
