"""What ComfyUI's page does with the name of the pack's folder in custom_nodes."""

from __future__ import annotations

import urllib.parse

SERVED = "!$&'()*+,;=:@~"
"""What a web server leaves as it is in a path, beside letters, digits and `_.-`."""
REMEDY = "Rename it, to wan-distributed, and restart ComfyUI"


def folder_problem(name: str) -> str:
    """What does not work in a folder of this name; empty if everything does."""
    called = f"the pack's folder is called {name!r}"
    if urllib.parse.quote(name, safe=SERVED) != name:
        return f"{called}: ComfyUI hands out nothing of it to the page, no player, help or example"
    return f"{called}: the page looks for its help under the part before the dot" if "." in name else ""
