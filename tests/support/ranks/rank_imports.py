"""What ranks import, once, before they are forked (forks.py): it takes longer than most of what they do."""

from __future__ import annotations

import importlib
import os

from mount import mount_pack

os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
mount_pack()
for name in (
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
    "wan_pack.distributed.rank.expert",
    "wan_pack.distributed.parallel.split_vae",
    "wan_pack.distributed.rank.worker",
):
    importlib.import_module(name)
