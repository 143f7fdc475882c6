"""The check in front of every route of a server that `gmpo serve` starts.

vLLM's own --api-key protects /v1 and its like, but not the routes that change weights.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gmpo.rollout.vllm.http.tokens import VARIABLE

OPEN = ("/health",)  # tells only whether the server lives

# ASGI's own types.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware that lets no request pass without the bearer token, whatever its path.

    Args:
        app: The application behind it.
        token: None takes the environment's.

    Raises:
        ValueError: There is no token.
    """

    def __init__(self, app: App, token: str | None = None) -> None:
        self.app = app
        token = token or os.environ.get(VARIABLE)
        if not token:
            raise ValueError(
                f"The server has no token. Set {VARIABLE}, or start it with gmpo serve."
            )
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN or self._knows_token(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refuse(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows_token(self, scope: Message) -> bool:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        return hmac.compare_digest(given, self.expected)


async def refuse(send: Send) -> None:
    """Answer 401."""
    error = {"message": "The bearer token is missing or wrong.", "code": 401}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
