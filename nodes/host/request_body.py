"""What a request to one of this pack's routes sends: a small JSON object, whatever arrives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import web

MAX_BODY = 1 << 16
"""Bytes. ComfyUI itself takes 100 MiB, for uploads."""


async def sent_object(request: web.Request) -> dict[str, Any]:
    """{} where nothing was sent. Raises aiohttp's 400 or 413 for anything but a JSON object of at most `MAX_BODY`."""
    from aiohttp import web

    body = b""
    async for chunk in request.content.iter_chunked(MAX_BODY):
        body += chunk
        if len(body) > MAX_BODY:
            raise web.HTTPRequestEntityTooLarge(MAX_BODY, len(body), text=f"the body has more than {MAX_BODY} bytes")
    try:
        sent = json.loads(body or b"{}")
    # Some thousand brackets inside each other are too deep for Python.
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text="the body is not JSON") from error
    if not isinstance(sent, dict):
        raise web.HTTPBadRequest(text="the body is not a JSON object")
    return sent
