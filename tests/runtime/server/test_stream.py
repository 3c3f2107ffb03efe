"""From the step thread to the client and back: clients that leave, engines that fail, readers that stall, queues that fill."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.adapters.source import AdapterUnavailable, Sink
from gpu_runtime.core import AdapterKey, FinishReason, SamplingParams, StepOutput, TokenLogprob
from gpu_runtime.kernels.sample import Sampled, SampleRow, sample
from gpu_runtime.server import stream as stream_module
from gpu_runtime.server.detokenize import StopScanner
from gpu_runtime.server.errors import ApiError
from gpu_runtime.server.stream import ChoiceText
from gpu_runtime.server.text import Text
from registry.wire import GRANT_HEADER
from tests.runtime.server.conftest import World
from tests.runtime.server.replica import BASE_DIGEST, TENANT, Replica, engine_replica, grant, wait_until

ENDLESS: dict[str, Any] = {"model": "m", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}


def all_free(replica: Replica) -> bool:
    state = replica.loop.state()
    return (state.num_running, state.num_queued, state.num_free_pages + state.num_idle_pages) == (0, 0, state.num_pages)


@pytest.fixture(scope="module")
def lonely(model_dir: Path) -> Iterator[Replica]:
    """A replica without adapters: when it is idle, every page is free."""
    with engine_replica(model_dir) as replica:
        yield replica


# ---- clients that leave ----


@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
def test_leaving_a_stream_frees_everything(lonely: Replica, prompt: Any) -> None:
    with lonely.streaming("/v1/completions", {**ENDLESS, "prompt": prompt}) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        wait_until(lambda: lonely.loop.state().num_running >= 1)
    wait_until(lambda: all_free(lonely), within_s=2.0)


def test_the_openai_client_leaves_by_close(lonely: Replica) -> None:
    stream = lonely.client().completions.create(prompt="x", model="m", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_until(lambda: all_free(lonely), within_s=2.0)


def test_leaving_before_the_reply_frees_everything(lonely: Replica) -> None:
    """Without streaming the client sees nothing before the end: the connection alone tells that it left."""
    with connection_to(lonely) as connection:
        connection.sendall(raw_request({**ENDLESS, "prompt": "x"}))
        wait_until(lambda: lonely.loop.state().num_running == 1)
    wait_until(lambda: all_free(lonely), within_s=2.0)


def test_leaving_in_the_middle_of_the_body_is_no_crash(lonely: Replica) -> None:
    with connection_to(lonely) as connection:
        connection.sendall(raw_request({**ENDLESS, "prompt": "x"})[:-10])
    assert lonely.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status_code == 200


class GatedSource:
    """A registry that answers only once the gate opens, and then the given way."""

    def __init__(self, then: AdapterUnavailable) -> None:
        self.gate = threading.Event()
        self.asked = threading.Event()
        self.then = then

    def describe(self, key: AdapterKey, *, grant: str | None) -> tuple[Mapping[str, Any], str]:
        self.asked.set()
        assert grant, "a pull carries the grant of the request that asks"
        assert self.gate.wait(20)
        raise self.then

    def fetch(self, key: AdapterKey, sha256: str, into: Sink, *, grant: str | None) -> None:
        raise AssertionError("describe refuses")


STRANGER = AdapterKey(TENANT, "c" * 64)


def test_leaving_while_the_adapter_is_on_its_way(model_dir: Path) -> None:
    source = GatedSource(AdapterUnavailable("gone", retryable=False))
    with engine_replica(model_dir, source) as replica:
        with connection_to(replica) as connection:
            connection.sendall(raw_request({**ENDLESS, "prompt": "x"}, token=grant(STRANGER)))
            assert source.asked.wait(5)
            wait_until(lambda: replica.loop.state().num_queued == 1)
        wait_until(lambda: all_free(replica), within_s=2.0)
        source.gate.set()
        assert replica.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_pull_holds_up_nobody_else(model_dir: Path) -> None:
    source = GatedSource(AdapterUnavailable("the registry is away", retryable=True))
    with engine_replica(model_dir, source) as replica, replica_thread(replica, STRANGER) as waiting:
        assert source.asked.wait(5)
        assert replica.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 3}).status_code == 200
        source.gate.set()
        waiting.join(5)
        (error,) = waiting.errors
        assert isinstance(error, openai.InternalServerError)
        assert (error.status_code, error.code) == (503, "unavailable")
        assert error.response.headers["retry-after"] == "1"
        assert "registry is away" in error.message


class replica_thread(threading.Thread):
    """A client in the background that asks for one completion and keeps the exception it gets."""

    def __init__(self, replica: Replica, key: AdapterKey) -> None:
        super().__init__(daemon=True)
        self._client = replica.client(key)
        self.errors: list[Exception] = []

    def run(self) -> None:
        try:
            self._client.completions.create(model="m", prompt="x")
        except openai.OpenAIError as error:
            self.errors.append(error)

    def __enter__(self) -> replica_thread:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(5)


# ---- engines that fail ----


class FailingSampler:
    """The real sampler until a request has said `after` tokens; then its logits are not numbers."""

    def __init__(self, after: int) -> None:
        self.after = after
        self._first: dict[int, int] = {}

    def __call__(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        chosen = sample(logits, rows)
        return [Sampled(None) if self._said(row) >= self.after else one for row, one in zip(rows, chosen, strict=True)]

    def _said(self, row: SampleRow) -> int:
        return row.position - self._first.setdefault(row.seed, row.position)


def test_a_failure_before_the_first_token_has_its_own_status(model_dir: Path) -> None:
    with engine_replica(model_dir, sampler=FailingSampler(after=0)) as replica:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="NaN or infinite") as caught:
                replica.client().completions.create(model="m", prompt="x", stream=stream)
            assert caught.value.code == "request_refused"


def test_a_failure_in_the_stream_is_an_event_that_the_client_raises(model_dir: Path) -> None:
    with engine_replica(model_dir, sampler=FailingSampler(after=5)) as replica:
        shown = []
        with pytest.raises(openai.APIError, match="NaN or infinite"):
            for chunk in replica.client().completions.create(prompt="x", stream=True, model="m", max_tokens=50, temperature=0):
                shown.append(chunk.choices[0].text)
        assert len(shown) == 5
        with replica.streaming("/v1/completions", {**ENDLESS, "prompt": "x"}) as response:
            assert b"[DONE]" not in response.read()
        wait_until(lambda: all_free(replica))


def test_an_engine_that_stops_tells_its_clients(model_dir: Path) -> None:
    with engine_replica(model_dir) as replica:
        stream = replica.client().completions.create(model="m", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        threading.Thread(target=replica.loop.stop).start()
        with pytest.raises(openai.APIError, match="engine has stopped"):
            list(stream)
        response = replica.post("/v1/completions", {"model": "m", "prompt": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert replica.get("/livez").status_code == 503


# ---- queues that fill, readers that stall ----


def test_a_full_queue_turns_requests_away_for_now(model_dir: Path) -> None:
    with engine_replica(model_dir, max_batch_requests=1, max_waiting=1) as replica, ExitStack() as held:
        body = {**ENDLESS, "prompt": "x"}
        first = held.enter_context(replica.streaming("/v1/completions", body))
        lines = first.iter_lines()  # a reader that is dropped closes its stream
        next(lines)
        connection = held.enter_context(connection_to(replica))
        connection.sendall(raw_request(body))
        wait_until(lambda: replica.loop.state().num_queued == 1)
        token = grant()
        refused = replica.post("/v1/completions", body, token=token)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        held.close()
        replica.wait_idle()
        assert replica.post("/v1/completions", {**body, "max_tokens": 1}, token=token).status_code == 200, "its grant was not spent"


def test_a_request_too_large_for_the_pool_is_refused(model_dir: Path) -> None:
    with engine_replica(model_dir, pool_bytes=256 * 1024) as replica, pytest.raises(openai.BadRequestError) as caught:
        replica.client().completions.create(model="m", prompt=[7] * 3000, max_tokens=500)
    assert caught.value.code == "request_refused"


def stalled_stream(replica: Replica) -> socket.socket:
    """A client that asks for megabytes and reads nothing."""
    connection = connection_to(replica, receive_bytes=4096)
    messages = [{"role": "user", "content": "x"}]
    body = {**ENDLESS, "max_tokens": 3500, "messages": messages, "stream": True, "logprobs": True, "top_logprobs": 20}
    connection.sendall(raw_request(body, path="/v1/chat/completions"))
    return connection


def test_a_stalled_reader_holds_no_pages_and_loses_nothing(lonely: Replica) -> None:
    with stalled_stream(lonely) as connection:
        wait_until(lambda: lonely.loop.state().num_running == 1)
        wait_until(lambda: all_free(lonely), within_s=60)
        received = b""
        while b"data: [DONE]" not in received[-200:]:
            received += connection.recv(1 << 20)
    events = [line for line in received.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
    assert sum(len(choice["logprobs"]["content"]) for choice in spoken(events) if choice["logprobs"]) == 3500


def spoken(events: list[bytes]) -> list[Any]:
    return [choice for event in events for choice in json.loads(event.removeprefix(b"data: "))["choices"]]


def test_a_reader_that_never_reads_is_given_up(lonely: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "SEND_TIMEOUT_S", 0.3)
    with stalled_stream(lonely) as connection:
        wait_until(lambda: lonely.loop.state().num_running == 1)
        wait_until(lambda: all_free(lonely), within_s=60)
        threading.Event().wait(0.5)
        received = b""
        while data := connection.recv(1 << 20):
            received += data
        assert b"[DONE]" not in received


# ---- one choice, token by token ----


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_and_entries_of_any_tokens_and_stops(model_dir: Path, data: st.DataObject) -> None:
    """Shown text is the decoded text up to the first stop; entries are the tokens of which some text is shown."""
    text = cached_text(model_dir)
    ids = data.draw(st.lists(st.integers(0, text.num_tokens - 1), min_size=1, max_size=30))
    full = text.decode(ids)
    start = data.draw(st.integers(0, max(0, len(full) - 1)))
    stops = data.draw(st.lists(st.sampled_from([full[start : start + 2], full[start : start + 5], "zz"]), max_size=2))
    stops = [stop for stop in stops if stop]
    choice = ChoiceText(text, index=0, params=SamplingParams(stop=tuple(stops)))
    shown, entries = "", []
    for at, token_id in enumerate(ids):
        reason = FinishReason.LENGTH if at == len(ids) - 1 else None
        piece = choice.push(StepOutput("r", token_id, logprob=TokenLogprob(token_id, -0.5), finish_reason=reason))
        shown += piece.text
        entries += piece.entries
        if piece.finish_reason is not None:
            break
    scanner = StopScanner(stops)
    expected = scanner.push(full) + scanner.finish()
    assert shown == expected
    assert choice.finish_reason == ("stop" if scanner.stopped else "length")
    assert [entry.logprob.token_id for entry in entries] == ids[: len(entries)]
    if not scanner.stopped:
        assert len(entries) == len(ids)
    assert all(entry.offset < len(shown) for entry in entries) or not scanner.stopped


_texts: dict[Path, Text] = {}


def cached_text(model_dir: Path) -> Text:
    return _texts.setdefault(model_dir, Text(model_dir))


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (StepOutput("r", None, finish_reason=FinishReason.ERROR, error="broken"), 400),
        (StepOutput("r", None, finish_reason=FinishReason.ERROR, error="away", retryable=True), 503),
        (StepOutput("r", None, finish_reason=FinishReason.CANCELLED), 503),
    ],
)
def test_the_engines_last_word_becomes_a_status(model_dir: Path, output: StepOutput, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        ChoiceText(cached_text(model_dir), index=0, params=SamplingParams()).push(output)
    assert caught.value.status == status


# ---- health ----


def test_health_says_what_is_missing(world: World, model_dir: Path) -> None:
    with engine_replica(model_dir, LocalSource(base_digest=BASE_DIGEST)) as replica:
        assert replica.get("/livez").json() == {"status": "ready"}
        assert replica.get("/readyz").status_code == 200
        replica.health.registered = lambda: False
        response = replica.get("/readyz")
        assert response.status_code == 503
        assert response.json()["checks"] == {"model_loaded": True, "registered": False, "admitting": True}
        assert response.json()["reasons"] == ["the registry does not know this replica"]
        replica.health.draining = True
        assert replica.get("/readyz").json()["checks"]["admitting"] is False
        refused = replica.post("/v1/completions", {"model": "m", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert replica.get("/livez").status_code == 200, "draining is not dying"


# ---- raw connections ----


def connection_to(replica: Replica, *, receive_bytes: int | None = None) -> socket.socket:
    address = urlsplit(replica.url)
    connection = socket.socket()
    connection.settimeout(20)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((address.hostname, address.port))
    return connection


def raw_request(body: Any, *, path: str = "/v1/completions", token: str | None = None) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{GRANT_HEADER}: {token or grant()}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content
