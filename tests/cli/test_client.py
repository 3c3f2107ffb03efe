"""The HTTP client against servers that misbehave: overloaded, absent, no registry at all, or not to be trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from registry.cli import client as client_module
from registry.cli.client import ApiProblem, RegistryClient, path
from registry.cli.failure import CliFailure
from registry.cli.output import clean, pick, show
from tests.cli.conftest import Lorary

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def answering(answer: Callable[[str, str, int], Answer]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers what `answer(method, path, number of the request)` says; yields its URL and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_any(self) -> None:
            asked.append(f"{self.command} {self.path}")
            status, headers, body = answer(self.command, self.path, len(asked))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_GET = do_POST = do_PUT = do_HEAD = do_any

        def log_message(self, *_arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


BUSY: Answer = (503, {"Retry-After": "0"}, b'{"detail": "the database is busy", "code": "unavailable"}')


def test_an_overloaded_registry_is_asked_again() -> None:
    with answering(lambda *a: BUSY if a[2] < 3 else (200, {}, b'{"ok": 1}')) as (url, asked), RegistryClient(url) as client:
        assert client.get("/whoami") == {"ok": 1}
        assert len(asked) == 3


def test_patience_with_an_overloaded_registry_ends() -> None:
    with answering(lambda *_: BUSY) as (url, asked), RegistryClient(url) as client:
        with pytest.raises(ApiProblem, match="the database is busy"):
            client.get("/whoami")
        assert len(asked) == client_module.MAX_TRIES


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"Retry-After": "0"}])
def test_what_may_not_be_repeated_or_must_wait_long_is_not(headers: dict[str, str]) -> None:
    method = "GET" if headers["Retry-After"] == "3600" else "POST"
    with answering(lambda *_: (503, headers, b"{}")) as (url, asked), RegistryClient(url) as client:
        with pytest.raises(ApiProblem):
            client.request(method, "/keys")
        assert len(asked) == 1


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"[1]", b"\xff\xfe"])
def test_a_server_that_is_no_registry_is_told_apart(body: bytes) -> None:
    with answering(lambda *_: (200, {}, body)) as (url, asked), RegistryClient(url) as client:
        with pytest.raises(CliFailure, match="did not answer with JSON"):
            client.get("/whoami")
        assert len(asked) == 1


def test_an_error_page_of_a_proxy_still_names_the_call_and_the_status() -> None:
    with answering(lambda *_: (502, {}, b"<html>")) as (url, asked), RegistryClient(url) as client:
        with pytest.raises(ApiProblem, match="GET /api/v1/whoami answered 502"):
            client.get("/whoami")
        assert len(asked) == 1


def test_redirects_are_not_followed_with_the_key() -> None:
    elsewhere: Answer = (302, {"Location": "http://127.0.0.1:9/steal"}, b"")
    with answering(lambda *_: elsewhere) as (url, asked), RegistryClient(url, token="lry_x") as client:
        with pytest.raises(ApiProblem):
            client.get("/whoami")
        assert len(asked) == 1


def test_an_absent_registry_is_a_failure_with_a_remedy(admin: Lorary) -> None:
    done = admin("tenants", "list", "--url", "http://127.0.0.1:9")
    assert done.code == 1
    assert "cannot reach the registry at http://127.0.0.1:9" in done.stderr
    assert "remedy: start it (`lorary up`)" in done.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8420", "ftp://host", "file:///etc/passwd"])
def test_a_url_of_another_kind_is_refused(admin: Lorary, url: str) -> None:
    done = admin("tenants", "list", "--url", url)
    assert done.code == 1
    assert "http:// or https://" in done.stderr


def test_a_loopback_registry_is_never_reached_through_a_proxy(admin: Lorary) -> None:
    assert admin("tenants", "list", HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9").code == 0


def test_names_never_change_the_route() -> None:
    assert path("adapters", "../keys", "versions", 3) == "/adapters/..%2Fkeys/versions/3"
    assert path("adapters", "a?b#c") == "/adapters/a%3Fb%23c"


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "..", "", "a\\b", "nul\0"])
def test_a_pull_never_writes_outside_its_folder(admin: Lorary, tmp_path: Path, name: str) -> None:
    import json

    version = json.dumps({"files": [{"path": name, "sha256": "0" * 64, "size": 1}]}).encode()
    with answering(lambda *_: (200, {}, version)) as (url, _):
        done = admin("adapters", "pull", "x@1", str(tmp_path / "in" / "here"), "--url", url)
    assert done.code == 1
    assert "would leave the folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_never_ends_stops_at_the_promised_size(admin: Lorary, tmp_path: Path) -> None:
    def answer(_method: str, route: str, _number: int) -> Answer:
        if "/files/" in route:
            return 200, {}, b"x" * 2**22
        return 200, {}, b'{"files": [{"path": "a", "sha256": "%s", "size": 3}]}' % (b"0" * 64)

    with answering(answer) as (url, _):
        done = admin("adapters", "pull", "x@1", str(tmp_path / "here"), "--url", url)
    assert done.code == 1
    assert "arrived damaged" in done.stderr
    assert not (tmp_path / "here").exists()


def test_cells_show_values_plainly_and_cleanly() -> None:
    assert [show(value) for value in (None, True, 3, ["a", "b"], [], {"a": 1}, "x")] == ["-", "yes", "3", "a, b", "-", '{"a": 1}', "x"]
    assert clean("a\x1b[2J\u202eb\nc") == "a\\x1b[2J\\x202eb c"
    assert pick({"a": {"b": 1}}, "a.b") == 1
    assert pick({"a": None}, "a.b") is None
