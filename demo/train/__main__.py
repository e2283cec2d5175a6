"""`python demo/train --part PART --out FOLDER`: mounts the pack under a private name and trains a part of the model."""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    # Python put this folder first on the path; its names are not meant as top-level modules.
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
    pack = types.ModuleType("_wan_distributed")
    pack.__path__ = [str(ROOT)]
    sys.modules[pack.__name__] = pack
    return importlib.import_module(f"{pack.__name__}.demo.train.run").main()


if __name__ == "__main__":
    raise SystemExit(main())
