"""Queues a workflow on a ComfyUI server and follows it over the WebSocket."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

NODE_EVENT = "wan_distributed.node"
"""Of this pack: what a node says, and pictures."""
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")

Event = tuple[str, dict[str, Any]]
"""Type and data of a message, such as ("progress", {"value": 3, "max": 9, ...}); a line of text is "text"."""


@dataclass(slots=True)
class Run:
    """One workflow's run."""

    prompt_id: str
    events: list[Event] = field(default_factory=list)

    @property
    def ending(self) -> Event:
        """The last of the events: success, error or interrupted."""
        assert self.events and self.events[-1][0] in ENDINGS, "the run has not ended"
        return self.events[-1]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Data of all events of one type."""
        return [data for name, data in self.events if name == kind]


class Refused(Exception):
    """The server does not take the workflow. `answer` is its reply: error and node_errors."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer, indent=1))
        self.answer = answer


async def run_prompt(
    url: str,
    prompt: dict[str, Any],
    *,
    on_event: Callable[[Run, str, dict[str, Any]], None] | None = None,
    timeout: float = 300.0,
) -> Run:
    """Queues an API-format workflow and returns when it has ended. Raises Refused, or TimeoutError."""
    client_id = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
        session.ws_connect(f"{url}/ws?clientId={client_id}", max_msg_size=0) as socket,
    ):
        async with session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": client_id}) as answer:
            body = await answer.json()
            if answer.status != 200 or body.get("node_errors"):
                raise Refused(body)
        run = Run(body["prompt_id"])
        async for message in socket:
            event = _event(message)
            if event is None or event[1].get("prompt_id", run.prompt_id) != run.prompt_id:
                continue
            run.events.append(event)
            if on_event is not None:
                on_event(run, *event)
            if event[0] in ENDINGS:
                return run
    raise ConnectionError("the server closed the connection before the run had ended")


def _event(message: aiohttp.WSMessage) -> Event | None:
    if message.type == aiohttp.WSMsgType.TEXT:
        content = json.loads(message.data)
        kind, data = content["type"], content["data"]
        return ("text" if kind == NODE_EVENT and "text" in data else kind), data
    return None
