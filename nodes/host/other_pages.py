"""Requests that other web pages make a browser send to ComfyUI, told from those of ComfyUI's page and of scripts."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

HEADER = "X-Wan-Distributed"
"""Sent by the pack's own page code with each POST, by scripts too. A browser asks the server before it lets another
page send it, and ComfyUI never says yes, not even with --enable-cors-header."""


def refusal(method: str, headers: Mapping[str, str], *, any_origin: bool = False) -> str | None:
    """Why one of the pack's routes refuses a request; None for one that it answers.

    Args:
        headers: looked up without regard to case.
        any_origin: ComfyUI runs with --enable-cors-header, as behind a proxy that changes Host: do not compare the two.
    """
    if comes_from_another_page(headers, any_origin=any_origin):
        return "requests of other web pages are refused"
    if method == "POST" and HEADER not in headers:
        return f"the header {HEADER} is missing; send it with any value, such as 1"
    return None


def comes_from_another_page(headers: Mapping[str, str], *, any_origin: bool = False) -> bool:
    """Whether a browser says so: by Sec-Fetch-Site, or by an Origin that is null or not where the request went."""
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if origin == "null":
        return True
    if site is not None:
        # None: the user's own doing, as in the address bar.
        return site not in ("same-origin", "none")
    return origin is not None and not any_origin and not _same_place(origin, headers.get("Host", ""))


def _same_place(origin: str, host: str) -> bool:
    """Whether they name the same host, and the same port where both name one: some proxies leave it out."""
    try:
        one, two = urlsplit(origin), urlsplit(f"//{host}")
        ports = {one.port, two.port} - {None}
    except ValueError:
        return False
    return one.hostname is not None and one.hostname == two.hostname and len(ports) < 2
