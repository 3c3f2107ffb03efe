"""Every error of the HTTP surface becomes one of two bodies: RFC 9457 under /api, OpenAI's object under /v1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DatabaseError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from registry.audit.service import record_refusal
from registry.errors import (
    PROBLEM_JSON,
    BadRequest,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    RateLimited,
    RegistryError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    encodable,
)
from registry.json_body import BodyRefused
from registry.tenants.auth import KeyRefused, Subject
from registry.wire import REQUEST_ID_HEADER

log = structlog.get_logger(__name__)

OUTAGE_RETRY_AFTER_S = 2
_BY_STATUS: dict[int, type[RegistryError]] = {
    error.status: error
    for error in (BadRequest, Unauthenticated, Forbidden, NotFound, Conflict, TooLarge, Invalid, RateLimited, Unavailable)
}


class MethodNotAllowed(RegistryError):
    status, code, title = 405, "method_not_allowed", "Method not allowed"


_BY_STATUS[MethodNotAllowed.status] = MethodNotAllowed


def render(
    request: Request, error: RegistryError, *, headers: dict[str, str] | None = None, extra: dict[str, Any] | None = None
) -> JSONResponse:
    """The response for `error` in the shape that the path asks for; `extra` joins the problem body."""
    request_id = getattr(request.state, "request_id", None)
    headers = error.headers() | (headers or {}) | ({REQUEST_ID_HEADER: request_id} if request_id else {})
    if _speaks_openai(request):
        return JSONResponse(error.openai(), status_code=error.status, headers=headers)
    if not request.url.path.startswith("/api/v1/"):
        headers["X-Error-Message"] = _one_line(error.detail)  # all that huggingface_hub shows of an error
    body = error.problem(instance=request.url.path) | (extra or {}) | ({"request_id": request_id} if request_id else {})
    return JSONResponse(body, status_code=error.status, headers=headers, media_type=PROBLEM_JSON)


def _one_line(text: str) -> str:
    """As a header can say it: printable ASCII. The server refuses to send other values, and breaks off instead."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in " ".join(text.split())[:500])


def _speaks_openai(request: Request) -> bool:
    path = request.url.path
    return path == "/v1" or path.startswith("/v1/")


async def _on_registry_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RegistryError)
    subject = _refused_subject(request, error)
    if subject is not None:
        reason = error.reason if isinstance(error, KeyRefused) else error.detail
        await run_in_threadpool(
            record_refusal,
            request.app.state.database,
            subject,
            method=request.method,
            path=request.url.path,
            status=error.status,
            reason=reason,
        )
    return render(request, error)


def _refused_subject(request: Request, error: RegistryError) -> Subject | None:
    """Whom the audit log names: a known key that lacks a right or is no longer good. Strangers fill no tables."""
    if isinstance(error, Forbidden):
        subject: Subject | None = getattr(request.state, "subject", None)
        return subject
    if isinstance(error, KeyRefused) and error.known:
        return Subject(key_id=error.key_id, tenant_id=error.tenant_id, tenant=None, scopes=frozenset())
    return None


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRefused):
        return render(request, error.problem)
    kind = _BY_STATUS.get(error.status_code)
    if kind is NotFound:
        problem: RegistryError = NotFound(f"nothing answers at {request.url.path}", field="path", value=request.url.path)
    elif kind is MethodNotAllowed:
        problem = MethodNotAllowed(f"{request.url.path} does not take {request.method}", field="method", value=request.method)
    else:
        problem = (kind or (RegistryError if error.status_code >= 500 else BadRequest))(str(error.detail))
    return render(request, problem, headers=dict(error.headers or {}))


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """422 with every field; under /v1 OpenAI's clients expect 400."""
    assert isinstance(error, RequestValidationError)
    found = [
        {"field": encodable(".".join(str(part) for part in item["loc"])), "message": encodable(item["msg"])} for item in error.errors()
    ]
    value = error.errors()[0].get("input")
    shown = value if isinstance(value, str | int | float | bool) else None
    said = f"{found[0]['field']}: {found[0]['message']}" + (f", not {shown!r:.80}" if shown is not None else "")
    kind = BadRequest if _speaks_openai(request) else Invalid
    problem = kind(said, field=found[0]["field"], value=shown, code="invalid", remedy="see the schema at /openapi.json")
    return render(request, problem, extra={"errors": found})


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    """The database is away, locked or broken: 503. Two writers meeting in a unique constraint: 409. Else our fault: 500."""
    assert isinstance(error, SQLAlchemyError)
    if isinstance(error, IntegrityError) and _is_unique_violation(error):
        log.info("db.unique_violation", error=str(error.orig))
        return render(request, Conflict("somebody else made the same thing at the same moment", remedy="read it again, then decide"))
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout) or type(error) is DatabaseError:
        log.error("db.unavailable", error=str(getattr(error, "orig", error)))
        return render(request, Unavailable("the database does not answer", retry_after_s=OUTAGE_RETRY_AFTER_S, remedy="try again soon"))
    log.exception("db.error", exc_info=error)
    return render(request, RegistryError("an internal error; it is logged under this request id"))


def _is_unique_violation(error: IntegrityError) -> bool:
    names = {"SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"}
    return getattr(error.orig, "sqlite_errorname", None) in names or getattr(error.orig, "sqlstate", None) == "23505"


async def _on_unknown_error(request: Request, _error: Exception) -> JSONResponse:
    return render(request, RegistryError("an internal error; it is logged under this request id"))


def install_error_handlers(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[..., Any]] = {
        RegistryError: _on_registry_error,
        HTTPException: _on_http_exception,
        RequestValidationError: _on_validation_error,
        SQLAlchemyError: _on_database_error,
        Exception: _on_unknown_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
