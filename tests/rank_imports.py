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
    "wan_pack.distributed.experts",
    "wan_pack.distributed.vae",
    "wan_pack.distributed.worker",
):
    importlib.import_module(name)
