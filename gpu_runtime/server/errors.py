"""Everything that a replica refuses, in OpenAI's error object."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """One refusal: a sentence for people, a stable `code` for programs, the request field at fault as `param`.

    `retry_after_s` goes out as Retry-After, which OpenAI clients honour on 503.
    """

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the client must change the request."""
    return ApiError(message, status=400, code=code, param=param)


def unauthorised(message: str, *, code: str) -> ApiError:
    """401: no grant, or not a good one."""
    return ApiError(message, status=401, code=code)


def unavailable(message: str, *, code: str = "unavailable", retry_after_s: int = 1) -> ApiError:
    """503: the same request may succeed a little later."""
    return ApiError(message, status=503, code=code, retry_after_s=retry_after_s)
