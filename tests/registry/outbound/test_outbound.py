"""The guarded client against hostile peers and resolvers: real sockets on loopback, 127.0.0.2 allowed, 127.0.0.1 "inside"."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest

from registry.outbound import Caps, OutboundClient, OutboundFailed, OutboundRefused
from registry.outbound_policy import OutboundPolicy
from registry.outbound_transport import Deadline, GuardedTransport
from tests.registry.outbound.peers import certificate_for, peer, says

POLICY = OutboundPolicy.parse(["127.0.0.2"], allow_http=True)
CLIENT = OutboundClient(POLICY)
BRIEF = Caps(total_s=0.6, connect_s=0.3, max_bytes=10_000)


class Resolver:
    """Answers in turn; the last answer stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_a_request_arrives_as_it_was_meant() -> None:
    with peer(says(body=b"thanks", X_Kind="yes")) as here:
        answer = CLIENT.request("POST", here.url("/hook?a=b"), headers={"X-Mine": "1"}, content=b"{}")
    assert (answer.status, answer.body, answer.headers["x-kind"]) == (200, b"thanks", "yes")
    (request,) = here.requests
    assert request.startswith(b"POST /hook?a=b HTTP/1.1\r\n")
    assert request.endswith(b"\r\n\r\n{}")
    assert b"x-mine: 1" in request.lower()


def test_what_leads_inside_is_never_contacted() -> None:
    with peer(says(), host="127.0.0.1") as inside:
        for url in (inside.url(), inside.url(host="localhost"), inside.url(host="[::ffff:127.0.0.1]")):
            with pytest.raises(OutboundRefused):
                CLIENT.request("GET", url)
    assert inside.requests == []


def test_a_rebinding_resolver_is_asked_once_and_believed_once() -> None:
    resolver = Resolver(["127.0.0.2"], ["127.0.0.1"])
    with peer(says(body=b"outside")) as here:
        client = OutboundClient(POLICY, resolve=resolver)
        answer = client.request("GET", here.url(host="hooks.example"))
        assert answer.body == b"outside"
        assert resolver.asked == ["hooks.example"]
        assert b"host: hooks.example:" in here.requests[0].lower()
        with pytest.raises(OutboundRefused) as refused:  # the next request resolves anew, and is checked anew
            client.request("GET", here.url(host="hooks.example"))
    assert "127.0.0.1" not in str(refused.value.problem()), "a refusal is no map of the inside"


@pytest.mark.parametrize("addresses", [["127.0.0.2", "10.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"], ["fd00:ec2::254"]])
def test_one_foot_inside_is_inside(addresses: list[str]) -> None:
    with peer(says()) as here, pytest.raises(OutboundRefused):
        OutboundClient(POLICY, resolve=Resolver(addresses)).request("GET", here.url(host="hooks.example"))
    assert here.requests == []


def test_the_next_address_is_tried() -> None:
    policy = OutboundPolicy.parse(["127.0.0.0/8"], allow_http=True)
    with peer(says(body=b"second")) as here:
        answer = OutboundClient(policy, resolve=Resolver(["127.0.0.3", "127.0.0.2"])).request("GET", here.url(host="hooks.example"))
    assert answer.body == b"second"


def test_redirects_are_an_answer_unless_they_are_asked_for() -> None:
    with peer(says("302 Found", Location="/x")) as here:
        assert CLIENT.request("GET", here.url()).status == 302
    assert len(here.requests) == 1


def test_no_redirect_leads_inside() -> None:
    with peer(says(), host="127.0.0.1") as inside:
        for location in (inside.url(), inside.url(host="2130706433"), f"//127.0.0.1:{inside.port}/", "file:///etc/passwd"):
            with peer(says("302 Found", Location=location)) as here, pytest.raises(OutboundRefused):
                CLIENT.request("GET", here.url(), caps=Caps(max_redirects=3))
    assert inside.requests == []


def test_a_redirect_to_a_name_that_rebinds_is_refused() -> None:
    client = OutboundClient(POLICY, resolve=Resolver(["127.0.0.2"], ["127.0.0.1"]))
    with peer(says("302 Found", Location="/again")) as here, pytest.raises(OutboundRefused):
        client.request("GET", here.url(host="hooks.example"), caps=Caps(max_redirects=3))
    assert len(here.requests) == 1


def test_hops_are_counted() -> None:
    with peer(says("302 Found", Location="/again")) as here, pytest.raises(OutboundFailed) as failed:
        CLIENT.request("GET", here.url(), caps=Caps(max_redirects=3))
    assert failed.value.code == "redirects"
    assert len(here.requests) == 4


def test_credentials_stay_with_their_origin() -> None:
    secret = {"Authorization": "Bearer s3cret", "Cookie": "s3cret", "X-Token": "s3cret", "Accept": "text/plain"}
    with peer(says()) as other, peer(says("302 Found", Location=other.url("/there"))) as here:
        CLIENT.request("GET", here.url(), headers=secret, caps=Caps(max_redirects=1))
    assert b"s3cret" in here.requests[0]
    assert b"s3cret" not in other.requests[0]
    assert b"accept: text/plain" in other.requests[0].lower()

    def home(connection: socket.socket, request: bytes) -> None:
        says("302 Found", Location="/there")(connection, request) if b"GET / " in request else says()(connection, request)

    with peer(home) as here:
        CLIENT.request("GET", here.url(), headers=secret, caps=Caps(max_redirects=1))
    assert b"s3cret" in here.requests[1]


def test_bodies_and_redirects() -> None:
    with peer(says()) as other:
        with peer(says("307 Temporary Redirect", Location=other.url())) as here, pytest.raises(OutboundRefused, match="body"):
            CLIENT.request("POST", here.url(), content=b"private", caps=Caps(max_redirects=1))
        assert other.requests == []
        with peer(says("303 See Other", Location=other.url())) as here:
            CLIENT.request("POST", here.url(), content=b"private", headers={"Content-Type": "text/plain"}, caps=Caps(max_redirects=1))
    assert other.requests[0].startswith(b"GET / ")
    assert b"private" not in other.requests[0]
    assert b"content-type" not in other.requests[0].lower()


def drip(connection: socket.socket, _request: bytes) -> None:
    while True:
        connection.sendall(b"H")
        time.sleep(0.05)


def drip_body(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
    drip(connection, _request)


def silence(connection: socket.socket, _request: bytes) -> None:
    connection.recv(1)


def endless(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n")


def endless_head(connection: socket.socket, _request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Filler: " + b"x" * 1000 + b"\r\n")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (drip, "protocol"),  # not even HTTP
        (drip_body, "timeout"),
        (silence, "timeout"),
        (endless, "too_large"),
        (endless_head, "protocol"),
        (says(body=b"x" * 10_001), "too_large"),
        (lambda connection, _: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"), "protocol"),
        (lambda connection, _: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), "protocol"),
        (lambda connection, _: connection.close(), "protocol"),
    ],
)
def test_hostile_answers_end_in_time(answer: object, code: str) -> None:
    started = time.monotonic()
    with peer(answer) as here:  # type: ignore[arg-type]
        with pytest.raises(OutboundFailed) as failed:
            CLIENT.request("GET", here.url(), caps=BRIEF)
        took_s = time.monotonic() - started
    assert failed.value.code in {code, "timeout"} if answer is drip else failed.value.code == code
    assert took_s < BRIEF.total_s + 1.5


def test_the_deadline_counts_over_all_hops() -> None:
    def slow_redirect(connection: socket.socket, request: bytes) -> None:
        time.sleep(0.25)
        says("302 Found", Location="/again")(connection, request)

    started = time.monotonic()
    with peer(slow_redirect) as here, pytest.raises(OutboundFailed) as failed:
        CLIENT.request("GET", here.url(), caps=Caps(total_s=0.6, max_redirects=50))
    assert failed.value.code == "timeout"
    assert time.monotonic() - started < 2


def test_a_resolver_that_hangs_or_fails() -> None:
    def hangs(host: str, port: int) -> Sequence[str]:
        time.sleep(3)
        return ["127.0.0.2"]

    def fails(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    for resolve, code in ((hangs, "timeout"), (fails, "dns"), (Resolver([]), "dns")):
        with pytest.raises(OutboundFailed) as failed:
            OutboundClient(POLICY, resolve=resolve).request("GET", "https://hooks.example/", caps=BRIEF)
        assert failed.value.code == code


def test_nobody_listens() -> None:
    with peer(says()) as here:
        url = here.url()
    with pytest.raises(OutboundFailed) as failed:
        CLIENT.request("GET", url, caps=BRIEF)
    assert failed.value.code == "connect"


def test_nothing_is_decompressed() -> None:
    bomb = gzip.compress(b"\0" * 1_000_000)
    with peer(says(body=bomb, Content_Encoding="gzip")) as here:
        assert CLIENT.request("GET", here.url(), caps=BRIEF).body == bomb


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with peer(says()) as here:
        assert CLIENT.request("GET", here.url()).status == 200


def test_tls_is_checked_against_the_name(tmp_path: Path) -> None:
    server, trust = certificate_for("hooks.example", tmp_path)
    client = OutboundClient(OutboundPolicy.parse(["127.0.0.2"], allow_http=False), resolve=Resolver(["127.0.0.2"]), tls=trust)
    with peer(says(), tls=server) as here:
        assert client.request("GET", here.url(host="hooks.example", scheme="https")).status == 200
        assert here.server_names == ["hooks.example"]
        for host in ("other.example", "127.0.0.2"):
            with pytest.raises(OutboundFailed) as failed:
                client.request("GET", here.url(host=host, scheme="https"))
            assert failed.value.code == "tls"
        with pytest.raises(OutboundFailed) as failed:  # a certificate that nobody vouches for
            OutboundClient(client.policy, resolve=Resolver(["127.0.0.2"])).request("GET", here.url(host="hooks.example", scheme="https"))
        assert failed.value.code == "tls"
    assert len(here.requests) == 1


def test_https_does_not_fall_back_to_http(tmp_path: Path) -> None:
    server, trust = certificate_for("hooks.example", tmp_path)
    client = OutboundClient(POLICY, resolve=Resolver(["127.0.0.2"]), tls=trust)
    with peer(says("302 Found", Location="http://hooks.example/"), tls=server) as here, pytest.raises(OutboundRefused, match="http"):
        client.request("GET", here.url(host="hooks.example", scheme="https"), caps=Caps(max_redirects=1))


def test_a_plain_port_is_no_tls() -> None:
    with peer(says()) as here, pytest.raises(OutboundFailed) as failed:
        CLIENT.request("GET", here.url(scheme="https"), caps=BRIEF)
    assert failed.value.code in {"tls", "timeout"}


def test_other_libraries_clients_are_guarded_below(tmp_path: Path) -> None:
    transport = GuardedTransport(POLICY, deadline=lambda: Deadline(5))
    with (
        peer(says(), host="127.0.0.1") as inside,
        peer(says("302 Found", Location=inside.url())) as here,
        httpx2.Client(transport=transport, trust_env=False, follow_redirects=True) as client,
    ):
        with pytest.raises(OutboundRefused):
            client.get(here.url())
        with pytest.raises(OutboundRefused):
            client.get(inside.url())
        assert client.get(here.url(), follow_redirects=False).status_code == 302
    assert inside.requests == []
