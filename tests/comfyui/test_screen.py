"""What a node shows before, while and after its runs: in the oldest and the newest page, in both renderers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from browsing import Browser, changes, page_folder, ui_workflow
from serving import HEIGHT, PICTURE, WIDTH, Comfy
from wan_pack.demo.example import BATCH, TEXT_TO_VIDEO, example, node_id, video_node

CONFIG = "WanVideoDistributedConfig"
NODES = ("LoadWanVideo", "WanVideo")
pytestmark = pytest.mark.usefixtures("stay_warm")


@pytest.mark.parametrize("version", ["oldest", "newest"])
@pytest.mark.parametrize("name", [TEXT_TO_VIDEO, BATCH])
def test_text_picture_and_players_are_there_in_every_run(
    browser: Browser, comfy: Comfy, name: str, version: str
) -> None:
    shipped, small = example(name), comfy.example(name, sample_steps=16)
    node, videos = node_id(shipped, video_node(shipped)), 2 if name == BATCH else 1
    values = changes(shipped, small)
    # Later runs are warm ones.
    for key, one in shipped.items():
        if one["class_type"] == CONFIG:
            values[key]["keep_warm_seconds"] = 300
    # Each page begins in the renderer that most have there, and goes on in the other.
    page = {"vue": True, "files": str(page_folder())} if version == "newest" else {"vue": False, "files": None}
    shown = browser.visit(
        "screen.mjs", comfy, name, **page, node=node, values=values, seed=500 if version == "oldest" else 600,
        videos=videos, runs=3 - videos, title=f"{version}_{name}",
    )  # fmt: skip
    assert shown["pageErrors"] == []
    # Small ones, two beside each other.
    pictures = (PICTURE, [2 * PICTURE[0] + 2, PICTURE[1]]) if name == BATCH else (PICTURE,)
    for renderer in ("canvas", "nodes2"):
        seen = shown[renderer]
        assert nothing_of_the_page(seen["before"]) and not seen["before"]["text"] and not seen["before"]["players"]
        for run in seen["runs"]:
            assert run["ending"][0] == "execution_success", run["ending"]
            check_live(run["live"], pictures)
            check_after(run["after"], videos)
        sources = [source(run["after"]) for run in seen["runs"]]
        assert len(set.union(*sources)) == sum(map(len, sources))
        assert seen["cancelled"]["text"] == seen["reopened"]["text"] == "cancelled"
        assert seen["cancelled"]["picture"] is None
        assert source(seen["cancelled"]) == source(seen["reopened"]) == sources[-1]
        check_saved(seen["saved"], name)
        assert "wan_video" not in seen["sent"]
        assert "no.mkv is in the output folder; this browser does not play it" in seen["unplayable"]["other"]
        assert seen["unplayable"]["again"] == "plays"
        check_overruled(seen["overruled"], name, hides=version == "newest")


def check_live(live: dict[str, Any], pictures: tuple[list[int], ...]) -> None:
    """In the middle of a run."""
    # A busy machine may have looked at the page only when the last step was done.
    assert re.search(r"sampling \d+/16|decoding", live["text"]), live
    assert live["picture"] in pictures and live["players"] == [], live
    assert nothing_of_the_page(live), live


def check_after(after: dict[str, Any], videos: int) -> None:
    assert re.match(r"done in \d+ s: " if videos == 1 else r"2 of 2 done in \d+ s", after["text"]), after
    assert after["picture"] is None and len(source(after)) == len(after["players"]) == videos, after
    for player in after["players"]:
        assert (player["ready"], player["width"], player["height"], player["error"]) == (4, WIDTH, HEIGHT, None), after
        assert min(player["shown"]) >= 60, after
    assert nothing_of_the_page(after), after


def check_overruled(seen: dict[str, Any], name: str, *, hides: bool) -> None:
    """What another input decides is not shown, or grey where a page cannot hide it, and sent nevertheless."""
    by_config = {"gpu_count", "use_ulysses", "use_fsdp", "offload_model", "plan"}
    by_text = set() if name == BATCH else {"prompt", "negative_prompt"}
    by_preset = {"scheduler", "sample_steps", "shift", "guidance_low", "guidance_high", "boundary"}
    how, other = ("hidden", "grey") if hides else ("grey", "hidden")
    linked, chosen, unlinked = (seen[when] for when in ("linked", "chosen", "unlinked"))
    assert set(linked[how]) == by_config | by_text
    assert set(chosen[how]) == by_config | by_text | by_preset
    assert unlinked[how] == linked[other] == chosen[other] == []
    assert by_config | by_preset <= set(seen["sent"])
    if not hides:
        assert chosen["height"] == linked["height"] == unlinked["height"]
    elif linked["text"]:
        # Nodes 2.0: "scheduler" is a row's own name. The rarely used are folded away.
        words = ("scheduler", "strength", "plan")
        shown = [{word for word in words if word in one["text"]} for one in (linked, chosen, unlinked)]
        assert shown == [{"scheduler"}, set(), {"scheduler", "plan"}]
        assert "Show advanced inputs" in linked["text"]
    else:
        assert chosen["height"] < linked["height"] < unlinked["height"]


def nothing_of_the_page(seen: dict[str, Any]) -> bool:
    """Whether the page shows no picture, player or text of its own on the node."""
    return not (seen["others"] or seen["images"] or seen["failed"])


def source(seen: dict[str, Any]) -> set[str]:
    return {player["src"] for player in seen["players"]}


def check_saved(saved: list[dict[str, Any]], name: str) -> None:
    """As many values as the shipped workflow has, each of the type that it has there."""
    shipped = {node["type"]: node["widgets_values"] for node in ui_workflow(name)["nodes"] if "widgets_values" in node}
    ours = [node for node in saved if node["type"].startswith(NODES)]
    assert len(ours) >= 3
    for node in ours:
        kinds = [type(value) for value in shipped[node["type"]]]
        assert len(node["values"]) == len(kinds), node
        for value, kind in zip(node["values"], kinds, strict=True):
            assert isinstance(value, (int, float) if kind in (int, float) else kind), node
