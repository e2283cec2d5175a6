"""A rank imports of diffusers what it uses, and not what else is installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from pathlib import Path

import mount
import pytest
from wan_pack.distributed.libraries import library_imports

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

from wan_pack.distributed.libraries.library_imports import MODULES, OPTIONAL

disable = torch.compiler.disable
{watched}
assert hides == [True]
assert all(name in sys.modules for name in MODULES)
assert ("torch._dynamo" in sys.modules) == loaded, "nor does diffusers bring it"
assert torch.compiler.disable is disable
print(*(name for name in OPTIONAL if name in sys.modules))

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
scheduler.set_timesteps(3)
AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])

# What was hidden is there for those who ask for it later, such as the text encoder.
import transformers.models.umt5.modeling_umt5
import scipy.stats

assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2.0, 2.0]
"""


WATCHED = """
import gc
import importlib
from types import SimpleNamespace
from wan_pack.distributed.libraries import library_imports

hides, collects = [], []
hidden = library_imports.hidden
library_imports.hidden = lambda names: hides.append(bool(names)) or hidden(names)
load = lambda name: collects.append(gc.isenabled()) or importlib.import_module(name)
library_imports.importlib = SimpleNamespace(import_module=load)
library_imports.import_diffusers()
assert collects and not any(collects) and gc.isenabled()
"""
"""Whether `import_diffusers` hides what is installed beside it, and collects garbage meanwhile."""
AFTER_OTHERS = f"""
from mount import mount_pack
mount_pack()
from diffusers import UniPCMultistepScheduler
{WATCHED}
print(*hides)
"""


def printed(script: str) -> list[str]:
    """Words that a Python of its own prints, which finds the pack and knows of nothing else."""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(mount.__file__).rpartition("/")[0], "HOME": "/nonexistent", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.split()


@pytest.mark.processes
def test_what_the_first_import_has_found_stays_found():
    """diffusers 0.37 imports what it had found then, whatever is hidden now: a solver may have been there before."""
    assert printed(AFTER_OTHERS) == ["False"]


@pytest.mark.processes
def test_optional_packages_are_not_imported_and_stay_importable():
    """Where diffusers comes first: of what is hidden then, nothing is printed."""
    assert printed(SCRIPT.replace("{watched}", WATCHED)) == []


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


DECORATES = """
import torch

@torch.compiler.disable
def plain():
    return 1

@torch.compiler.disable(recursive=False, reason="none")
def also():
    return 2

try:
    import made_up_compiler
except ImportError:
    made_up_compiler = None
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Imports modules of these texts as import_diffusers does: `diffusers.used` with a made-up compiler beside it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("diffusers", "made_up_compiler")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library_imports, "MODULES", ("diffusers.used",))
    monkeypatch.setattr(library_imports, "COMPILER", "made_up_compiler")
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("seen = []")
    (tmp_path / "made_up_compiler.py").write_text("FLAG = 7")

    def load(text: str):
        (tmp_path / "diffusers" / "used.py").write_text(text)
        library_imports.import_diffusers()
        return sys.modules["diffusers.used"]

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] in ("diffusers", "made_up_compiler")]:
        del sys.modules[name]


def test_the_compiler_is_left_out_where_it_only_decorates(packages):
    import torch

    disable = torch.compiler.disable
    used = packages(DECORATES)
    assert (used.plain(), used.also(), used.made_up_compiler) == (1, 2, None)
    assert "made_up_compiler" not in sys.modules and torch.compiler.disable is disable
    import made_up_compiler

    assert made_up_compiler.FLAG == 7


def test_it_is_imported_where_it_is_there_already(packages):
    import made_up_compiler

    assert packages(DECORATES).made_up_compiler is made_up_compiler


@pytest.mark.parametrize("need", ["import made_up_compiler", "import diffusers\nfrom made_up_compiler import FLAG"])
def test_a_version_that_needs_more_of_the_compiler_gets_it(packages, need: str):
    used = packages(f"import diffusers\ndiffusers.seen.append(1)\n{need}")
    assert "made_up_compiler" in sys.modules
    assert sys.modules["diffusers"].seen == [1], "what was imported in part is imported again"
    assert used is sys.modules["diffusers.used"]


def test_a_version_that_cannot_be_imported_says_why(packages):
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        packages("import no_such_library")


def test_other_threads_can_import_the_compiler_meanwhile(packages):
    found = []

    def look() -> None:
        import made_up_compiler

        found.append(made_up_compiler.FLAG)

    finders = list(was := sys.meta_path)
    with library_imports.uncompiled():
        # A thread in the midst of an import goes through the list that it began with.
        assert was == finders and sys.meta_path[1:] == finders
        other = threading.Thread(target=look)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("made_up_compiler")
        other.start()
        other.join()
    assert found == [7] and sys.meta_path == finders
    assert "made_up_compiler" in sys.modules
