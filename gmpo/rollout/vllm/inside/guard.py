"""What stands in front of every route of a server that `gmpo serve` starts.

vLLM's own --api-key protects /v1 and its like, but not the routes that change weights.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from gmpo.rollout.vllm.http.tokens import VARIABLE

OPEN = ("/health",)  # tells nothing but whether the server lives


class Guard:
    """ASGI middleware: no request without the bearer token, whatever its path.

    Args:
        app: What it protects.
        token: None takes the environment's.

    Raises:
        ValueError: There is no token.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], token: str | None = None) -> None:
        self.app = app
        token = token or os.environ.get(VARIABLE)
        if not token:
            raise ValueError(
                f"The server has no token. Set {VARIABLE}, or start it with gmpo serve."
            )
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN or self._knows_token(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refuse(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows_token(self, scope: dict[str, Any]) -> bool:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        return hmac.compare_digest(given, self.expected)


async def refuse(send: Any) -> None:
    body = json.dumps(
        {"error": {"message": "The bearer token is missing or wrong.", "code": 401}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
