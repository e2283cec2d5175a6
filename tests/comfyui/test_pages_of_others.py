"""Other web pages cannot end the groups of processes that a real ComfyUI keeps warm."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from serving import Comfy, kept

RELEASE = "/wan_distributed/release"
PAGE = {"Content-Type": "application/json", "X-Wan-Distributed": "1"}


def status(comfy: Comfy, path: str, headers: dict[str, str], body: object = None) -> int:
    request = urllib.request.Request(comfy.server.url + path, json.dumps(body or {}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_fault_36_only_the_page_and_scripts_release_groups(comfy: Comfy) -> None:
    assert comfy.run(kept(comfy.example(seed=360), gpu_count=1)).ending[0] == "execution_success"
    processes = comfy.job_processes()
    assert len(processes) == 2
    foreign = ({"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://127.0.0.1:1"})
    plain = {"Content-Type": "text/plain"}
    for path in (RELEASE, f"/api{RELEASE}"):
        for headers in (plain, {"Content-Type": "application/json"}, *({**PAGE, **more} for more in foreign)):
            assert status(comfy, path, headers) == 403, headers
    # ComfyUI's own route: what it answers is its own affair, but warm groups stay. Not free_memory: ComfyUI empties its
    # cache for that, and if it was busy when it was asked, only after the next test's first prompt.
    for headers in foreign:
        status(comfy, "/free", {**plain, **headers}, {"unload_models": True})
    assert comfy.job_processes() == processes
    origin = {"Origin": comfy.server.url, "Sec-Fetch-Site": "same-origin"}
    assert status(comfy, RELEASE, {**PAGE, **origin}) == 200
    comfy.wait_until_idle()
