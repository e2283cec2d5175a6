"""Whether anything takes a node's images: only then are they made, for they are large.

ComfyUI tells a node that runs what is linked to it, but nothing of that counts when it decides whether a node must run
again. So what is queued is marked before: with another mark it is another node to ComfyUI's cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

NODE = "WanVideoDistributedInference"
OUTPUT = 5
"""Index of `images` among its outputs."""
MARK = "images_are_linked"
"""An input that the node does not declare: it is part of the cache's key, and is handed to nobody."""
TOO_LATE = (
    "images: this node ran before anything was linked to it, so that there are none. Change its seed; or, where no "
    "other node makes the link while the workflow runs, queue it from the page or with POST /prompt, which notice it"
)


def mark_queued(queued: Any) -> None:
    """Marks the nodes in what is sent to POST /prompt whose images are linked, and no others. It may be any JSON."""
    nodes = queued.get("prompt") if isinstance(queued, dict) else None
    if not isinstance(nodes, dict):
        return
    takers = _linked(nodes.values())
    for name, node in nodes.items():
        if isinstance(node, dict) and node.get("class_type") == NODE and isinstance(node.get("inputs"), dict):
            node["inputs"].pop(MARK, None)
            if name in takers:
                node["inputs"][MARK] = True


def images_linked(running: Any, node_id: str | None) -> bool:
    """Whether a node's images are linked.

    Args:
        running: ComfyUI's DYNPROMPT, with the nodes that others have been replaced by; None where there is none.
    """
    if running is None:
        return False
    return node_id in _linked(running.get_node(other) for other in running.all_node_ids())


def _linked(nodes: Iterable[Any]) -> set[str]:
    """Ids of nodes of any kind whose output of that index is linked."""
    found = set()
    for node in nodes:
        inputs = node.get("inputs") if isinstance(node, dict) else None
        for value in inputs.values() if isinstance(inputs, dict) else ():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[1] == OUTPUT:
                found.add(value[0])
    return found
