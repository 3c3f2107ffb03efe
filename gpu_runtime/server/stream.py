"""From the step thread to one client: engine outputs become pieces of text, and a client that leaves stops its requests.

ChoiceText   one engine request's outputs -> pieces (detokenised, cut at stop strings)
Generation   the engine requests of one HTTP request, and their life: submit, read, close
EventStream  pieces -> server-sent events
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gpu_runtime.core import FinishReason, Request, SamplingParams, StepOutput
from gpu_runtime.engine.state import EngineState
from gpu_runtime.server.detokenize import StopScanner
from gpu_runtime.server.errors import ApiError, invalid, unavailable
from gpu_runtime.server.replies import Piece, TokenEntry
from gpu_runtime.server.text import Text

SEND_TIMEOUT_S = 60.0  # a client that reads nothing for so long has left without saying so
SHOWN_REASON = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class StepLoop(Protocol):
    """What the server needs of `EngineLoop`."""

    def submit(self, request: Request, *, grant: str | None, sink: Callable[[StepOutput], None]) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def state(self) -> EngineState: ...

    def inspect(self) -> Future[dict[str, Any]]: ...


class ClientGone(Exception):
    """The client closed its connection before the reply was whole."""


class ChoiceText:
    """What one choice has said so far. Raises ApiError from `push` where the engine gives up on it."""

    def __init__(self, text: Text, *, index: int, params: SamplingParams) -> None:
        self._index = index
        self._params = params
        self._detokenizer = text.detokenizer()
        self._scanner = StopScanner(params.stop, include=params.include_stop)
        self._num_decoded = 0  # characters decoded, and of those shown; between the two lies what a stop string may take back
        self._num_shown = 0
        self._unshown: deque[TokenEntry] = deque()
        self.num_tokens = 0
        self.num_cached = 0
        self.finish_reason: str | None = None

    def push(self, output: StepOutput) -> Piece:
        self._raise_failure(output)
        ends_here = output.finish_reason is FinishReason.STOP and not self._params.include_stop  # then the token is not text
        self.num_tokens += output.token_id is not None
        self.num_cached = max(self.num_cached, output.num_cached)
        text = "" if output.token_id is None or ends_here else self._decode(output.token_id, output)
        shown = self._scanner.push(text) if self.num_tokens > self._params.min_tokens else text
        if self._scanner.stopped:
            self.finish_reason = "stop"
        elif output.finish_reason is not None:
            shown += self._rest()
            self.finish_reason = "stop" if self._scanner.stopped else SHOWN_REASON[output.finish_reason]
        self._num_shown += len(shown)
        return Piece(self._index, shown, entries=self._shown_entries(), finish_reason=self.finish_reason, prompt=output.prompt_logprobs)

    def _raise_failure(self, output: StepOutput) -> None:
        if output.finish_reason in (None, *SHOWN_REASON):
            return
        message = output.error or "the request was cancelled"
        if output.retryable or output.finish_reason is FinishReason.CANCELLED:
            raise unavailable(message, retry_after_s=output.retry_after_s)
        raise invalid(message, code="request_refused")

    def _decode(self, token_id: int, output: StepOutput) -> str:
        text = self._detokenizer.push(token_id)
        self._num_decoded += len(text)
        if output.logprob is not None:
            # A token may finish the character of the one before it: its own text is the end of what it brought to light.
            own = min(len(text), self._detokenizer.num_characters(token_id))
            self._unshown.append(TokenEntry(output.logprob, offset=self._num_decoded - own))
        return text

    def _rest(self) -> str:
        """The unfinished character and the held text: nothing more is coming."""
        shown = self._scanner.push(self._detokenizer.finish())
        return shown if self._scanner.stopped else shown + self._scanner.finish()

    def _shown_entries(self) -> tuple[TokenEntry, ...]:
        """Tokens of which some text has been shown; at the end all, unless a stop string took them back."""
        everything = self.finish_reason is not None and not self._scanner.stopped
        entries = []
        while self._unshown and (everything or self._unshown[0].offset < self._num_shown):
            entries.append(self._unshown.popleft())
        return tuple(entries)


class Generation:
    """The engine requests of one HTTP request, read in one place. Lives on one event loop; `close` always.

    `paused` hears the seconds between two tokens of one choice, as they come here.

    What waits here unread is bounded by the requests' own max_tokens.
    """

    def __init__(self, engine: StepLoop, text: Text, *, paused: Callable[[float], None] = lambda _: None) -> None:
        self._engine = engine
        self._paused = paused
        self._spoke_at: dict[str, float] = {}
        self._text = text
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StepOutput | None] = asyncio.Queue()  # None: the client has left
        self._choices: dict[str, ChoiceText] = {}
        self._candidates = 1
        self._running: set[str] = set()
        self._watch: asyncio.Task[None] | None = None

    def submit(self, requests: Sequence[Request], *, grant: str, candidates: int = 1) -> None:
        """Queue all, of each prompt `candidates` side by side.

        Raises what `EngineLoop.submit` raises; those already queued are then for `close` to cancel.
        """
        self._candidates = candidates
        for index, request in enumerate(requests):
            self._engine.submit(request, grant=grant, sink=self._sink)
            self._running.add(request.request_id)
            self._choices[request.request_id] = ChoiceText(self._text, index=index, params=request.params)

    def watch(self, receive: Receive) -> None:
        """End the reading with ClientGone once the connection closes. The request's body must have been read."""
        self._watch = self._loop.create_task(self._until_disconnect(receive))

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, all that are ready together. Raises ApiError (engine gave up) and ClientGone."""
        while self._running:
            outputs = [await self._events.get()]
            while not self._events.empty():
                outputs.append(self._events.get_nowait())
            pieces: list[Piece] = []
            try:
                for output in outputs:
                    pieces += self._pieces(output)
            except ApiError:
                if pieces:
                    yield pieces  # what was said before the failure was said
                raise
            yield pieces

    def close(self) -> None:
        """Cancel in the engine whatever has not finished. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
        for request_id in self._running:
            self._engine.cancel(request_id)
        self._running.clear()

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices.values())

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts, each counted once however many candidates it has: what its first candidate found in the pool."""
        return sum(choice.num_cached for choice in list(self._choices.values())[:: self._candidates])

    @property
    def finish_reasons(self) -> list[str | None]:
        return [choice.finish_reason for choice in self._choices.values()]

    def _sink(self, output: StepOutput) -> None:
        """Called on the step thread. Raises RuntimeError once this event loop is closed, which the step thread expects."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, output)

    def _pieces(self, output: StepOutput | None) -> tuple[Piece, ...]:
        if output is None:
            raise ClientGone
        if output.request_id not in self._running:
            return ()  # the tail of a choice that a stop string has ended
        if output.finish_reason is not None:
            self._running.discard(output.request_id)
        self._time(output)
        choice = self._choices[output.request_id]
        piece = choice.push(output)
        if choice.finish_reason is not None and output.request_id in self._running:
            self._running.discard(output.request_id)
            self._engine.cancel(output.request_id)
        return (piece,)

    def _time(self, output: StepOutput) -> None:
        if output.token_id is None:
            return
        now_s = time.monotonic()
        if output.request_id in self._spoke_at:
            self._paused(now_s - self._spoke_at[output.request_id])
        self._spoke_at[output.request_id] = now_s

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


class EventStream(Response):
    """A streamed reply: each batch of JSON objects goes out in one write; `finish` runs however the stream ends."""

    media_type = "text/event-stream"

    def __init__(
        self, batches: AsyncIterator[list[dict[str, Any]]], *, headers: Mapping[str, str], finish: Callable[[ApiError | None], None]
    ) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._batches = batches
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        failure: ApiError | None = client_closed()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for batch in self._batches:
                await _write(send, b"".join(event(value) for value in batch))
            await _write(send, b"data: [DONE]\n\n")
            failure = None
        except ApiError as error:  # too late for a status: OpenAI clients raise on an error object in the stream
            failure = error
        except (ClientGone, TimeoutError, OSError):
            return
        finally:
            self._finish(failure)
        last = b"" if failure is None else event(failure.body())
        await send({"type": "http.response.body", "body": last, "more_body": False})


def client_closed() -> ApiError:
    """499, for the log: nobody is left to read it."""
    return ApiError("the client closed the connection", status=499, code="client_closed")


def event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"


def as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


async def _write(send: Send, data: bytes) -> None:
    if data:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": data, "more_body": True})
