"""JSON bodies of strangers: UTF-8, no key twice, no half characters. Looked at as the application reads them."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.artifact.errors import ArtifactRefused
from registry.artifact.strict_json import load_object
from registry.errors import BadRequest

_OPENAI_PREFIX = "/v1/"


class BodyRefused(HTTPException):
    """FastAPI turns other exceptions met while it reads a body into its own 400; this one it lets pass."""

    def __init__(self, problem: BadRequest) -> None:
        super().__init__(problem.status, problem.detail)
        self.problem = problem


class StrictJson:
    """Refuses a JSON body that two readers could read differently. What is not declared JSON passes, but for `/v1`.

    Inside the limit on bodies: what is held here is at most as large as that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_json(scope):
            await self.app(scope, receive, send)
            return
        body = bytearray()

        async def receive_checked() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if body and not message.get("more_body", False):
                    read_object(bytes(body))
                    body.clear()
            return message

        await self.app(scope, receive_checked, send)


def _is_json(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json") or str(scope["path"]).startswith(_OPENAI_PREFIX)


def read_object(body: bytes) -> dict[str, Any]:
    """The one JSON object that a body is. Raises BodyRefused with where it stops being one."""
    try:
        return load_object(body, field="body", code="bad_json")
    except ArtifactRefused as refusal:
        code = {"bad_json": "invalid_json"}.get(refusal.code, refusal.code)
        problem = BadRequest(refusal.detail, field="body", value=refusal.value, remedy=refusal.remedy, code=code)
        raise BodyRefused(problem) from refusal
