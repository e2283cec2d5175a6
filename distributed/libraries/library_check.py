"""`imports MODULE...`: imports what a rank would of each, in a rank's environment, and prints a line of JSON for each.

An installation may have all packages and still not work: one that was built for another torch breaks those that make
use of it, wherever they are imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import traceback
from collections.abc import Callable, Iterator, Sequence

from .library_imports import import_diffusers

COMPANIONS = ("torchaudio", "torchvision")
"""Built for one release of torch each, and imported by other packages where they are."""


def _diffusers() -> object:
    import_diffusers()
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    return AutoencoderKLWan


def _transformers() -> object:
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    return CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel


IMPORTS: dict[str, Callable[[], object]] = {"diffusers": _diffusers, "transformers": _transformers}
"""Of packages that give their classes when asked for them; all others are imported by name."""


def main(arguments: Sequence[str]) -> int:
    """Arguments: modules. Returns 0."""
    for module in arguments:
        print(json.dumps({"module": module, **check(module)}), flush=True)
    return 0


def check(module: str) -> dict[str, str]:
    """`missing`, `error` (what was raised) and `because` (of a companion of torch), each empty where it is not so."""
    found = {"missing": "", "error": "", "because": ""}
    if importlib.util.find_spec(module) is None:
        return found | {"missing": module}
    try:
        IMPORTS.get(module, lambda: importlib.import_module(module))()
    # Whatever a broken installation raises.
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        found |= {"error": f"{type(error).__name__}: {error}", "because": ". ".join(_blamed(text))}
    return found


def _blamed(text: str) -> Iterator[str]:
    """Which companions of torch a traceback goes through, and what would fit."""
    torch = importlib.metadata.version("torch")
    for name in COMPANIONS:
        if not re.search(rf'[/"]{name}[/."]|lib{name}', text):
            continue
        version = importlib.metadata.version(name)
        wanted = [found[1] for line in importlib.metadata.requires(name) or () if (found := _TORCH.match(line))]
        # torchaudio's release has torch's own number, also where it does not ask for it.
        fitting = wanted[0] if wanted else version.partition("+")[0]
        yield f"{name} {version} does not work with torch {torch}: install torch {fitting} with it, or take {name} out"


_TORCH = re.compile(r"torch\s*\(?==\s*([0-9.]+)")
