"""`python demo/meaning MODELS`: measures what the trained model shows."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Instead of this folder, which Python put there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from start import run

    raise SystemExit(run("meaning.verdict"))
