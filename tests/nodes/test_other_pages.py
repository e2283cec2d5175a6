"""Which requests the pack's own routes answer, by their headers."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from multidict import CIMultiDict
from wan_pack.nodes.host import warm
from wan_pack.nodes.host.other_pages import HEADER, comes_from_another_page, refusal

OURS = {HEADER: "1", "Host": "127.0.0.1:8188"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "null"},
        {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://[::1"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        # Another port of this machine is the same site.
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:9999"},
    ],
)
def test_fault_36_other_pages_are_refused_even_with_the_header(headers: dict[str, str]) -> None:
    assert refusal("POST", CIMultiDict(OURS | headers)) == "requests of other web pages are refused"
    assert refusal("GET", CIMultiDict(OURS | headers)) is not None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:8188", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://127.0.0.1:8188"},
        {"Sec-Fetch-Site": "none"},
        # Behind a proxy that gives the page another host, or leaves out the port.
        {"Origin": "https://comfy.example", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://lan:8080", "Host": "lan"},
    ],
)
def test_fault_36_the_page_and_scripts_are_answered_and_a_post_needs_the_header(headers: dict[str, str]) -> None:
    assert refusal("POST", CIMultiDict(OURS | headers)) is None
    without = {name: value for name, value in (OURS | headers).items() if name != HEADER}
    assert HEADER in str(refusal("POST", CIMultiDict(without)))
    assert refusal("GET", CIMultiDict(without)) is None


def test_fault_36_a_server_told_not_to_compare_hosts_still_refuses_what_a_browser_calls_foreign() -> None:
    renamed = OURS | {"Origin": "http://comfy.lan"}
    assert comes_from_another_page(renamed)
    assert not comes_from_another_page(renamed, any_origin=True)
    assert comes_from_another_page(renamed | {"Origin": "null"}, any_origin=True)
    assert comes_from_another_page(renamed | {"Sec-Fetch-Site": "cross-site"}, any_origin=True)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The groups that were asked to end."""
    asked: list[str | None] = []
    monkeypatch.setattr(warm, "release", lambda group_id=None: asked.append(group_id) or 1)
    return asked


def posts(
    requests: list[tuple[str, Mapping[str, str]]], monkeypatch: pytest.MonkeyPatch, cors: str | None = None
) -> list[int]:
    """Statuses of POSTs to the pack's routes and a /free as ComfyUI's, in a server of its kind."""

    async def free(_: web.Request) -> web.Response:
        return web.Response()

    server = types.SimpleNamespace(routes=web.RouteTableDef(), app=web.Application())
    modules: dict[str, Any] = {
        "server": types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server)),
        "comfy": types.ModuleType("comfy"),
        "comfy.cli_args": types.SimpleNamespace(args=types.SimpleNamespace(enable_cors_header=cors)),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    warm.register()
    server.routes.post("/free")(free)
    server.app.add_routes(server.routes)
    body = {"unload_models": True}

    async def send() -> list[int]:
        async with TestClient(TestServer(server.app)) as client:
            return [(await client.post(path, json=body, headers=headers)).status for path, headers in requests]

    return asyncio.run(send())


@pytest.mark.parametrize("foreign", [{"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil"}])
def test_fault_36_the_routes_and_the_reaction_to_free_ask(
    foreign: dict[str, str], released: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    route, header = "/wan_distributed/release", {HEADER: "1"}
    assert posts([(route, {}), (route, header | foreign), ("/free", foreign)], monkeypatch) == [403, 403, 200]
    assert released == []
    assert posts([(route, header), ("/free", {})], monkeypatch) == [200, 200]
    assert len(released) == 2


def test_fault_36_a_proxy_that_renames_the_host_under_enable_cors_header(
    released: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ("/wan_distributed/release", {HEADER: "1", "Origin": "http://comfy.lan"})
    assert posts([request], monkeypatch) == [403]
    assert posts([request], monkeypatch, cors="*") == [200]
