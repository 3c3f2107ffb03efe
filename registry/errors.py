"""The error tree of the registry, and its two renderings.

    RegistryError                 500 unless a subclass says otherwise
    |- Invalid                    422  the request's content is refused; names field, value and remedy
    |- BadRequest                 400  the request cannot be read at all (cursor, header, path)
    |- Unauthenticated            401
    |- Forbidden                  403  the key is known but lacks a scope
    |- QuotaExceeded              403  the tenant has as much as it may have
    |- NotFound                   404  absent, or another tenant's: the two are never told apart
    |- Conflict                   409
    |- PreconditionFailed         412  compare-and-swap lost
    |- TooLarge                   413
    |- RangeNotSatisfiable        416  with the size there is
    |- PreconditionRequired       428
    |- RateLimited                429
    |- Unavailable                503  always with Retry-After
    `- StorageFull                507  the disk below the blobs is full; nothing was kept

`/api/v1` renders RFC 9457 problems; `/v1` renders OpenAI's error object.
"""

from __future__ import annotations

from typing import Any, ClassVar

PROBLEM_JSON = "application/problem+json"


class RegistryError(Exception):
    """Something a caller must hear about.

    `detail` is one sentence that names the field, the value and the remedy; the three are also machine-readable.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        value: object | None = None,
        remedy: str | None = None,
        retry_after_s: int | None = None,
        code: str | None = None,
    ) -> None:
        detail = encodable(detail)
        super().__init__(detail)
        self.detail = detail
        self.field = None if field is None else encodable(field)
        self.value = None if value is None else encodable(str(value)[:200])
        self.remedy = remedy
        self.retry_after_s = retry_after_s
        self.error_code = code or self.code

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def problem(self, *, instance: str | None = None) -> dict[str, Any]:
        """RFC 9457 body. `type` is a stable relative URI made from the code."""
        body = {
            "type": f"/problems/{self.error_code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.error_code,
            "instance": instance,
            "field": self.field,
            "value": self.value,
            "remedy": self.remedy,
        }
        return {key: value for key, value in body.items() if value is not None}

    def openai(self) -> dict[str, Any]:
        """OpenAI's error object, for everything under `/v1`."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.field, "code": self.error_code}}


def encodable(text: str) -> str:
    """What a stranger sent may hold lone surrogates, which JSON can spell and UTF-8 cannot: shown as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class Invalid(RegistryError):
    status, code, title = 422, "invalid", "Request refused"


class BadRequest(RegistryError):
    status, code, title = 400, "bad_request", "Bad request"


class Unauthenticated(RegistryError):
    status, code, title = 401, "unauthenticated", "API key missing or not valid"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"WWW-Authenticate": "Bearer"}


class Forbidden(RegistryError):
    status, code, title = 403, "forbidden", "API key lacks a scope"


class QuotaExceeded(RegistryError):
    status, code, title = 403, "quota_exceeded", "Quota exceeded"


class NotFound(RegistryError):
    status, code, title = 404, "not_found", "Not found"


class Conflict(RegistryError):
    status, code, title = 409, "conflict", "Conflict"


class PreconditionFailed(RegistryError):
    status, code, title = 412, "precondition_failed", "Changed since you read it"


class TooLarge(RegistryError):
    status, code, title = 413, "too_large", "Too large"


class RangeNotSatisfiable(RegistryError):
    status, code, title = 416, "range_not_satisfiable", "Range not satisfiable"

    def __init__(self, header: str, *, size: int) -> None:
        super().__init__(
            f"Range {header!r} names no byte of the {size} there are",
            field="Range",
            value=header,
            remedy=f"ask for one range within them, such as bytes=0-{max(0, size - 1)}",
        )
        self.size = size

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Content-Range": f"bytes */{self.size}"}


class PreconditionRequired(RegistryError):
    status, code, title = 428, "precondition_required", "Precondition required"


class RateLimited(RegistryError):
    status, code, title = 429, "rate_limited", "Too many requests"

    def openai(self) -> dict[str, Any]:
        """OpenAI names the kind of limit as the type: `requests`, `tokens`, or `insufficient_quota` where waiting does not help."""
        kind = "insufficient_quota" if self.error_code == "insufficient_quota" else self.field
        return {"error": {"message": self.detail, "type": kind, "param": None, "code": self.error_code}}


class Unavailable(RegistryError):
    status, code, title = 503, "unavailable", "Temporarily unavailable"


class StorageFull(RegistryError):
    status, code, title = 507, "storage_full", "Storage is full"


PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "instance": {"type": "string"},
        "field": {"type": "string"},
        "value": {"type": "string"},
        "remedy": {"type": "string"},
    },
}


def problem_responses(*errors: type[RegistryError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of an endpoint: every error it can answer with, for the OpenAPI document.

    401 and 503 are added by the application to every endpoint and need not be named.
    """
    return {error.status: {"description": error.title, "content": {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA}}} for error in errors}
