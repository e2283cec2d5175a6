"""What ComfyUI serves of packs whose folders have other names than ours, and what the pack says of it."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from wan_pack.demo.comfyui import Server
from wan_pack.demo.example import ROOT
from wan_pack.distributed.machine.pack_folder import REMEDY, folder_problem

GOOD = ("wan_distributed", "Wan~(1)+@2", "wan-distributed")
BAD = ("wan distributed", "wan-ü", "wan%20x", "wan#x", "wan[1]")
DOTTED = ("wan-distributed-1.0", "wan.v2")
FILES = ("extensions/{}/js/release.js", "extensions/{}/docs/WanVideoDistributedConfig.md",
         "api/workflow_templates/{}/batch_workflow.json")  # fmt: skip


def served(server: Server, name: str) -> bool:
    """Whether all kinds of files are; raises AssertionError if some kinds are."""
    found = set()
    for file in FILES:
        try:
            with urllib.request.urlopen(f"{server.url}/{file.format(quote(name))}") as answer:
                found.add(answer.status == 200)
        except urllib.error.HTTPError as error:
            assert error.code == 404
            found.add(False)
    assert len(found) == 1, name
    return found.pop()


def test_the_start_says_what_the_page_will_not_find(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes").mkdir()
    for name in (*GOOD, *BAD, *DOTTED):
        # The last one is the server's own.
        if name != GOOD[-1]:
            (tmp_path / "custom_nodes" / name).symlink_to(ROOT, target_is_directory=True)
    with Server(tmp_path, pack=ROOT) as server:
        log = server.log.read_text()
        for name in (*GOOD, *BAD, *DOTTED):
            assert served(server, name) == (name not in BAD), name
            problem = folder_problem(name)
            assert (bool(problem) == (name not in GOOD) and f"{problem}. {REMEDY}" in log) or name in GOOD, name
            assert ("before the dot" in problem) == (name in DOTTED), name
        assert log.count(REMEDY) == len(BAD) + len(DOTTED)
