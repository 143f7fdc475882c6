"""The bearer token between a trainer and the servers that `gmpo serve` starts."""

import os
import secrets
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

VARIABLE = "VLLM_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")


def token_file(port: int) -> Path:
    """Return where the token of this user's server at `port` lies; only this user can read it."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "gmpo" / f"server-{port}.token"


def new_token(port: int) -> str:
    """Make a secret token, and leave it where this user's trainers on this machine find it."""
    token = secrets.token_urlsafe(32)
    path = token_file(port)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)  # readable by this user only
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    os.replace(unfinished, path)
    return token


def find_token(address: str) -> str | None:
    """Return the environment's token, else the one that `gmpo serve` left here, else None."""
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]

    parts = urlsplit(address)
    if parts.hostname not in LOOPBACK or parts.port is None:
        return None
    path = token_file(parts.port)
    return path.read_text().strip() if path.exists() else None
