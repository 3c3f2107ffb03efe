"""The OpenAPI document: what FastAPI derives, plus every error that the application itself can answer with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from registry.errors import (
    PROBLEM_JSON,
    PROBLEM_SCHEMA,
    BadRequest,
    Forbidden,
    Invalid,
    NotFound,
    RegistryError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

OPENAI_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_METHODS = ("get", "put", "post", "patch", "delete", "head")


def install_openapi(app: FastAPI) -> None:
    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = _with_errors(made)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _with_errors(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for generated in ("HTTPValidationError", "ValidationError"):
        schemas.pop(generated, None)
    schemas |= {"Problem": PROBLEM_SCHEMA, "OpenAIError": OPENAI_ERROR_SCHEMA}
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                _add_errors(path, operations[method])
    return document


def _add_errors(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    for error in _implied(path, operation):
        responses.setdefault(str(error.status), {"description": error.title})
    for status, response in responses.items():
        if int(status) >= 400:
            response["content"] = _content(path)


def _implied(path: str, operation: dict[str, Any]) -> list[type[RegistryError]]:
    """What the application answers around an endpoint: authentication, limits, validation, an outage."""
    errors: list[type[RegistryError]] = []
    if "422" in operation["responses"]:  # FastAPI adds it where there is anything to validate
        errors.append(Invalid)
        operation["responses"]["422"]["description"] = Invalid.title
    if path.startswith("/v1/"):
        operation["responses"].pop("422", None)
        errors = [BadRequest]
    if operation.get("security"):
        errors += [Unauthenticated, Forbidden, BadRequest, NotFound]  # 404 too: the tenant that an admin's header names
    if "requestBody" in operation:
        errors.append(TooLarge)
    return [*errors, Unavailable]


def _content(path: str) -> dict[str, Any]:
    if path.startswith("/v1/"):
        return {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
    return {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
