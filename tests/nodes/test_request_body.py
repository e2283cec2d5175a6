"""What a request to one of the pack's routes may send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from wan_pack.nodes.host.request_body import MAX_BODY, sent_object

web = pytest.importorskip("aiohttp.web")


def sent(*chunks: bytes) -> dict[str, Any]:
    """By a request that arrives in these pieces."""

    async def iter_chunked(size: int) -> AsyncIterator[bytes]:
        assert size <= MAX_BODY
        for chunk in chunks:
            yield chunk

    return asyncio.run(sent_object(SimpleNamespace(content=SimpleNamespace(iter_chunked=iter_chunked))))


def test_an_object_arrives_in_pieces_and_nothing_is_an_empty_one() -> None:
    assert sent(b'{"a": ', b"1}") == {"a": 1}
    assert sent() == {}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[" * 60_000, "the body is not JSON"), (b"{", "the body is not JSON"), (b"\xff", "the body is not JSON"),
        (b"[1]", "the body is not a JSON object"), (b"null", "the body is not a JSON object"),
    ],
)  # fmt: skip
def test_anything_else_is_a_bad_request(body: bytes, words: str) -> None:
    with pytest.raises(web.HTTPBadRequest) as refused:
        sent(body)
    assert refused.value.text == words


def test_a_bound_is_allowed_and_one_byte_more_is_not() -> None:
    text = b'{"a": "' + b"x" * (MAX_BODY - 9) + b'"}'
    assert len(text) == MAX_BODY and sent(text)["a"].startswith("xxx")
    with pytest.raises(web.HTTPRequestEntityTooLarge) as refused:
        sent(text, b" ", b"never read" * 100)
    assert refused.value.text == f"the body has more than {MAX_BODY} bytes"
