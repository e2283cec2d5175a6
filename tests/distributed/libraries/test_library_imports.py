"""A rank imports of diffusers what it uses, and not what else is installed."""

from __future__ import annotations

import subprocess
import sys

import mount
import pytest

SCRIPT = """
import sys
import torch
loaded, solver = "torch._dynamo" in sys.modules, "sympy" in sys.modules
from mount import mount_pack
mount_pack()
import wan_pack.distributed.rank.worker
assert ("torch._dynamo" in sys.modules) == loaded, "the compiler takes half a second, and most ranks compile nothing"
assert "torch.distributed.fsdp" not in sys.modules
from wan_pack.wan.checkpoint.weights import take_memory

with torch.device("meta"):
    layer = torch.nn.Linear(3, 2)
take_memory(layer, torch.device("cpu"))
assert layer.weight.shape == (2, 3) and not layer.weight.is_meta and layer.bias.device.type == "cpu"
assert ("sympy" in sys.modules) == solver, "a second, for the memory of a model"

from wan_pack.distributed.libraries.library_imports import MODULES, OPTIONAL, import_diffusers

import_diffusers()
assert all(name in sys.modules for name in MODULES)
print(*(name for name in OPTIONAL if name in sys.modules))

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
scheduler.set_timesteps(3)
AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])

# What was hidden is there for those who ask for it later, such as the text encoder.
import transformers.models.umt5.modeling_umt5
import scipy.stats
"""


AFTER_OTHERS = """
from mount import mount_pack
mount_pack()
from wan_pack.distributed.libraries import library_imports

import gc
import importlib
from types import SimpleNamespace

hides, collects = [], []
hidden = library_imports.hidden
library_imports.hidden = lambda names: hides.append(bool(names)) or hidden(names)
{first}
load = lambda name: collects.append(gc.isenabled()) or importlib.import_module(name)
library_imports.importlib = SimpleNamespace(import_module=load)
library_imports.import_diffusers()
assert collects and not any(collects) and gc.isenabled()
print(*hides)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("first", "hides"),
    [("", "True"), ("from diffusers import UniPCMultistepScheduler", "False")],
    ids=["first", "later"],
)
def test_what_the_first_import_has_found_stays_found(first: str, hides: str):
    """diffusers 0.37 imports what it had found then, whatever is hidden now: a solver may have been there before."""
    ended = subprocess.run(
        [sys.executable, "-c", AFTER_OTHERS.format(first=first)],
        capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(mount.__file__).rpartition("/")[0], "HOME": "/nonexistent", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout.split()) == (0, [hides]), ended.stderr[-2000:]


@pytest.mark.processes
def test_optional_packages_are_not_imported_and_stay_importable():
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(mount.__file__).rpartition("/")[0], "HOME": "/nonexistent", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == []


def test_hidden_packages_look_absent_only_inside():
    from importlib.util import find_spec

    from wan_pack.distributed.libraries.library_imports import hidden

    assert "wave" not in sys.modules
    with hidden(("wave", "json")):
        assert find_spec("wave") is None
        with pytest.raises(ModuleNotFoundError):
            import wave
        import json  # It was imported before, by others who use it.
    import wave

    assert wave and json
