"""Logs: one JSON object a line, with the request's context, and never a secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
import structlog
from fastapi.testclient import TestClient

from registry.logging import REDACTED, configure_logging
from registry.tenants.keys import key_id_of, new_key
from tests.registry.conftest import MakeTenant, bearer


@contextmanager
def written(**options: str) -> Iterator[StringIO]:
    """What the configured handler writes (pytest changes sys.stderr under it); logging is put back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging(**options)
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    stream = StringIO()
    handler.setStream(stream)
    yield stream
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def logged() -> Iterator[Callable[[], list[dict]]]:
    """A function that returns the lines so far, parsed."""
    with written(format="json", level="INFO") as stream:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_access_line_names_request_tenant_and_key(logged, client: TestClient, make_tenant: MakeTenant) -> None:
    token = make_tenant("acme")
    reply = client.get("/api/v1/whoami", headers=bearer(token) | {"X-Request-Id": "theirs"})
    (line,) = [line for line in logged() if line["event"] == "http.request"]
    assert line["request_id"] == reply.headers["x-request-id"]
    assert (line["tenant"], line["key_id"], line["client_request_id"]) == ("acme", key_id_of(token), "theirs")
    assert reply.headers["x-client-request-id"] == "theirs"
    assert (line["method"], line["path"], line["status"], line["level"]) == ("GET", "/api/v1/whoami", 200, "info")
    assert line["duration_s"] >= 0


def test_lines_inside_a_request_carry_its_context(logged, app, client: TestClient, make_tenant: MakeTenant) -> None:
    """Also from a worker thread, where `def` endpoints run."""
    from fastapi import Depends

    from registry.tenants.auth import current_subject

    @app.get("/api/v1/talk", dependencies=[Depends(current_subject)])
    def talk() -> None:
        structlog.get_logger("x").info("adapter.pulled")
        logging.getLogger("some.library").warning("said %s", "plainly")

    token = make_tenant("acme")
    reply = client.get("/api/v1/talk", headers=bearer(token))
    ours, theirs = [line for line in logged() if line["event"] in {"adapter.pulled", "said plainly"}]
    for line in (ours, theirs):
        assert line["request_id"] == reply.headers["x-request-id"]
        assert (line["tenant"], line["key_id"]) == ("acme", key_id_of(token))


def test_context_does_not_leak_into_the_next_request(logged, client: TestClient, make_tenant: MakeTenant) -> None:
    client.get("/api/v1/whoami", headers=bearer(make_tenant("acme")))
    client.get("/api/v1/whoami")
    first, second = [line for line in logged() if line["event"] == "http.request"]
    assert first["tenant"] == "acme"
    assert "tenant" not in second
    assert first["request_id"] != second["request_id"]


def test_secrets_are_redacted_wherever_they_hide(logged) -> None:
    token = new_key().token
    log = structlog.get_logger("x")
    log.info("a.b", authorization=f"Bearer {token}", note=f"used {token}!", nested={"grant": "x", "list": [token]})
    logging.getLogger("library").warning("sent %s", token)
    try:
        raise RuntimeError(token)
    except RuntimeError:
        log.exception("c.d")
    lines = logged()
    assert len(lines) == 3
    assert token not in json.dumps(lines)
    assert lines[0]["note"] == f"used {REDACTED}!"
    assert lines[0]["nested"] == {"grant": REDACTED, "list": [REDACTED]}


def test_refused_tokens_stay_out_of_logs_and_replies(logged, client: TestClient) -> None:
    token = new_key().token
    reply = client.get("/api/v1/whoami", headers=bearer(token))
    assert token not in reply.text
    assert token not in json.dumps(logged())


def test_probes_do_not_fill_the_log(logged, client: TestClient) -> None:
    client.get("/livez")
    assert [line for line in logged() if line["event"] == "http.request"] == []


def test_console_format() -> None:
    with written(format="console", level="WARNING") as stream:
        structlog.get_logger("x").info("quiet.event")
        structlog.get_logger("x").warning("loud.event", number=3)
    assert "loud.event" in stream.getvalue()
    assert "quiet.event" not in stream.getvalue()
