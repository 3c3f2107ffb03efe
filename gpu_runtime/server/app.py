"""The replica's HTTP face: OpenAI's two inference endpoints behind grants, and two health endpoints.

A request is one sentence: admit -> read -> encode -> submit -> speak. Sessions, keys and tenants are the registry's;
what arrives here was authorised there, and the grant says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from gpu_runtime.core import Request
from gpu_runtime.engine.loop import EngineFull, EngineStopped
from gpu_runtime.server import tracing
from gpu_runtime.server.errors import ApiError, invalid, unavailable
from gpu_runtime.server.grants import GrantVerifier
from gpu_runtime.server.health import Health
from gpu_runtime.server.inspection import report, require_inspection
from gpu_runtime.server.intake import (
    Permission,
    admit,
    check_token_ids,
    deadline_of,
    encode_prompts,
    engine_requests,
    read_body,
    sampling_for,
)
from gpu_runtime.server.metrics import RuntimeMetrics
from gpu_runtime.server.openai import ChatRequest, CompletionRequest, GenerationRequest, read_request
from gpu_runtime.server.replies import ChatShape, CompletionShape, Piece, Shape, Usage, best_of
from gpu_runtime.server.stream import ClientGone, EventStream, Generation, StepLoop, as_json, client_closed
from gpu_runtime.server.text import Text
from gpu_runtime.server.usage import UsageBuffer
from registry.wire import FORM_DIGEST_HEADER, GRANT_HEADER, REQUEST_ID_HEADER, STATE_PATH, VERSION_DIGEST_HEADER, GrantClaims

log = structlog.get_logger(__name__)

UNAVAILABLE = 503
ENDPOINTS: dict[type[GenerationRequest], str] = {CompletionRequest: "completions", ChatRequest: "chat"}


@dataclass(frozen=True)
class Serving:
    """What every request needs. `context_tokens`: prompt and completion together; `max_waiting`: queue length that turns requests away;
    `deadline_ms`: for the first token, where the client names none, 0 for ever."""

    engine: StepLoop
    text: Text
    verifier: GrantVerifier
    health: Health
    usage: UsageBuffer
    context_tokens: int
    max_waiting: int
    deadline_ms: int = 0


@dataclass
class Exchange:
    """One request as the log tells it: once, when it is over."""

    permission: Permission
    metrics: RuntimeMetrics
    reports: UsageBuffer
    endpoint: str
    started_s: float = field(default_factory=time.monotonic)
    num_prompt_tokens: int = 0
    first_token_s: float | None = None
    generation: Generation | None = None
    failure: ApiError | None = field(default_factory=lambda: ApiError("the request was interrupted", status=500, code="internal"))
    streams: bool = False  # then the stream finishes the exchange

    def __post_init__(self) -> None:
        self._span = tracing.start_generation(self.claims, endpoint=self.endpoint, grant=self.permission.token)

    @property
    def claims(self) -> GrantClaims:
        return self.permission.claims

    def headers(self) -> dict[str, str]:
        named = {
            REQUEST_ID_HEADER: self.claims.jti,
            VERSION_DIGEST_HEADER: self.claims.version_digest,
            FORM_DIGEST_HEADER: self.claims.form_digest,
        }
        return {name: value for name, value in named.items() if value is not None}

    def usage(self) -> Usage:
        if self.generation is None:
            return Usage(self.num_prompt_tokens, 0)
        return Usage(self.num_prompt_tokens, self.generation.num_tokens, self.generation.num_cached_tokens)

    def finish_stream(self, failure: ApiError | None) -> None:
        self.failure = failure
        self.finish()

    def finish(self) -> None:
        """Release what the engine holds, and say how it went."""
        failure, usage = self.failure, self.usage()
        reasons = [] if self.generation is None else self.generation.finish_reasons
        if self.generation is not None:
            self.generation.close()
        self._report(usage)
        self.metrics.finished(
            endpoint=self.endpoint,
            status=200 if failure is None else failure.status,
            num_prompt_tokens=usage.num_prompt_tokens,
            duration_s=time.monotonic() - self.started_s,
        )
        first_token_s = None if self.first_token_s is None else round(self.first_token_s - self.started_s, 4)
        tracing.end_generation(
            self._span,
            grant=self.permission.token,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            finish_reasons=reasons,
            first_token_s=first_token_s,
            error_code=None if failure is None else failure.code,
        )
        log.info(
            "request.finished",
            request_id=self.claims.jti,
            tenant=self.claims.tenant,
            model=self.claims.model,
            version_digest=self.claims.version_digest,
            form_digest=self.claims.form_digest,
            status=200 if failure is None else failure.status,
            error=None if failure is None else failure.message,
            finish_reasons=reasons,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            first_token_s=first_token_s,
            duration_s=round(time.monotonic() - self.started_s, 4),
        )

    def _report(self, usage: Usage) -> None:
        """To the registry, which charges it. The prompt counts from the first token on: before it nothing was answered.

        What was turned away with 503 before a stream began is offered to another replica, so it is not ours to report.
        """
        status = 200 if self.failure is None else self.failure.status
        if status == UNAVAILABLE and not self.streams:
            return
        started = self.first_token_s is not None
        self.reports.add(
            self.permission.token,
            status=status,
            num_prompt_tokens=usage.num_prompt_tokens if started else 0,
            num_completion_tokens=usage.num_completion_tokens if started else 0,
        )


def create_app(serving: Serving) -> FastAPI:
    """The application over a started engine loop. Nothing in it blocks the event loop."""
    app = FastAPI(title="Lorary replica", docs_url=None, redoc_url=None, openapi_url=None, telemetry=tracing.APPLICATION)
    app.state.serving = serving
    app.state.metrics = RuntimeMetrics(serving.engine.state, serving.health)
    app.add_api_route("/v1/completions", _completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"])
    app.add_api_route("/livez", _livez, methods=["GET"])
    app.add_api_route("/readyz", _readyz, methods=["GET"])
    app.add_api_route("/metrics", _metrics, methods=["GET"])
    app.add_api_route(STATE_PATH, _state, methods=["GET"])
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_crash)
    return app


async def _completions(http: HttpRequest) -> Response:
    return await _serve(http, kind=CompletionRequest)


async def _chat(http: HttpRequest) -> Response:
    return await _serve(http, kind=ChatRequest)


async def _livez(http: HttpRequest) -> Response:
    return _serving(http).health.live()


async def _readyz(http: HttpRequest) -> Response:
    return _serving(http).health.ready()


async def _metrics(http: HttpRequest) -> Response:
    """Open to whoever reaches this port, which is the registry's side of the network: the front door relays two paths, not this."""
    content, media_type = await asyncio.to_thread(_metrics_of(http).exposition, http.headers.get("accept", ""))
    return Response(content, media_type=media_type)


async def _state(http: HttpRequest) -> Response:
    serving = _serving(http)
    require_inspection(http.headers.get(GRANT_HEADER, ""), verifier=serving.verifier)
    return JSONResponse(await report(serving.engine, health=serving.health, metrics=_metrics_of(http)))


def _metrics_of(http: HttpRequest) -> RuntimeMetrics:
    metrics: RuntimeMetrics = http.app.state.metrics
    return metrics


def _serving(http: HttpRequest) -> Serving:
    serving: Serving = http.app.state.serving
    return serving


async def _serve(http: HttpRequest, *, kind: type[GenerationRequest]) -> Response:
    serving = _serving(http)
    _refuse_when_full(serving)
    permission = _admit(http, serving)
    exchange = Exchange(permission, _metrics_of(http), serving.usage, ENDPOINTS[kind])
    try:
        return await _answer(http, serving, permission, exchange, kind=kind)
    except ApiError as error:
        exchange.failure = error
        return _error_response(error, headers=exchange.headers())
    except ClientGone:
        exchange.failure = client_closed()
        return Response(status_code=499)
    finally:
        if not exchange.streams:
            exchange.finish()


def _admit(http: HttpRequest, serving: Serving) -> Permission:
    try:
        return admit(http, verifier=serving.verifier)
    except ApiError as error:
        _metrics_of(http).grant_refused(error.code)
        raise


async def _answer(
    http: HttpRequest, serving: Serving, permission: Permission, exchange: Exchange, *, kind: type[GenerationRequest]
) -> Response:
    deadline_s = deadline_of(http, now_s=exchange.started_s, default_ms=serving.deadline_ms)
    asked = read_request(await read_body(http), kind=kind)
    check_token_ids(asked, num_tokens=serving.text.num_tokens)
    prompts = await encode_prompts(asked, text=serving.text, context_tokens=serving.context_tokens)
    exchange.num_prompt_tokens = sum(map(len, prompts))
    params = sampling_for(asked, prompts, claims=permission.claims, context_tokens=serving.context_tokens)
    exchange.generation = Generation(serving.engine, serving.text, paused=exchange.metrics.paused)
    exchange.generation.watch(http.receive)
    requests = engine_requests(prompts, params, permission=permission, deadline_s=deadline_s)
    _submit(exchange.generation, requests, grant=permission.token, candidates=asked.num_candidates)
    batches = exchange.generation.batches()
    first = await anext(batches)  # before any header goes out, so that what fails early fails with its own status
    exchange.first_token_s = time.monotonic()
    exchange.metrics.began(has_adapter=permission.adapter is not None, after_s=exchange.first_token_s - exchange.started_s)
    shape = _shape(asked, prompts, serving.text, permission.claims)
    if asked.stream:
        exchange.streams = True
        chunks = _chunks(shape, first, batches, num_choices=len(params), usage=exchange.usage if asked.include_usage else None)
        return EventStream(chunks, headers=exchange.headers(), finish=exchange.finish_stream)
    choices = best_of(await _collect(first, batches, num_choices=len(params)), candidates=asked.num_candidates, keep=asked.num_choices)
    exchange.failure = None
    return Response(as_json(shape.whole(choices, exchange.usage())), media_type="application/json", headers=exchange.headers())


def _refuse_when_full(serving: Serving) -> None:
    """Before the grant is spent: a client that comes back shall find it good."""
    if serving.health.draining:
        raise unavailable("this replica is shutting down", code="draining")
    if serving.engine.state().num_queued >= serving.max_waiting:
        raise unavailable(f"{serving.max_waiting} requests are waiting already", code="overloaded")


def _submit(generation: Generation, requests: Sequence[Request], *, grant: str, candidates: int) -> None:
    try:
        generation.submit(requests, grant=grant, candidates=candidates)
    except ValueError as error:
        raise invalid(str(error), code="request_refused") from error
    except EngineStopped as error:
        raise unavailable(str(error), code="overloaded" if isinstance(error, EngineFull) else "draining") from error


def _shape(asked: GenerationRequest, prompts: tuple[tuple[int, ...], ...], text: Text, claims: GrantClaims) -> Shape:
    told: dict[str, Any] = {
        "reply_id": claims.jti,
        "model": claims.model,
        "created": int(time.time()),
        "vocabulary": text.vocabulary,
        "num_logprobs": asked.num_logprobs,
        "num_prompt_logprobs": asked.prompt_logprobs,
    }
    if isinstance(asked, CompletionRequest):
        told_prompts = tuple(prompt for prompt in prompts for _ in range(asked.num_choices))
        return CompletionShape(**told, echoes=tuple(_echoes(asked, prompts, text)) if asked.echo else (), prompts=told_prompts)
    return ChatShape(**told)


def _echoes(asked: CompletionRequest, prompts: tuple[tuple[int, ...], ...], text: Text) -> list[str]:
    """The prompt of each choice as it was given; given as ids, its text."""
    texts = [given if isinstance(given, str) else text.decode(ids) for given, ids in zip(asked.prompt, prompts, strict=True)]
    return [shown for shown in texts for _ in range(asked.num_choices)]


async def _chunks(
    shape: Shape, first: list[Piece], batches: AsyncIterator[list[Piece]], *, num_choices: int, usage: Callable[[], Usage] | None
) -> AsyncIterator[list[dict[str, Any]]]:
    """Every chunk of a stream. With usage, all but the last one carry `usage: null`, as OpenAI's do."""
    extra: dict[str, Any] = {} if usage is None else {"usage": None}
    opening = [chunk for index in range(num_choices) if (chunk := shape.opening(index)) is not None]
    yield [chunk | extra for chunk in (*opening, *_told(shape, first))]
    async for batch in batches:
        yield [chunk | extra for chunk in _told(shape, batch)]
    if usage is not None:
        yield [shape.usage_chunk(usage())]


def _told(shape: Shape, pieces: list[Piece]) -> list[dict[str, Any]]:
    return [chunk for piece in pieces for chunk in shape.chunks(piece)]


async def _collect(first: list[Piece], batches: AsyncIterator[list[Piece]], *, num_choices: int) -> list[Piece]:
    """All pieces of each choice as one."""
    pieces = list(first)
    async for batch in batches:
        pieces += batch
    return [_joined([piece for piece in pieces if piece.index == index], index=index) for index in range(num_choices)]


def _joined(pieces: list[Piece], *, index: int) -> Piece:
    entries = tuple(entry for piece in pieces for entry in piece.entries)
    text, scored = "".join(piece.text for piece in pieces), next((piece.prompt for piece in pieces if piece.prompt is not None), None)
    return Piece(index, text, entries=entries, finish_reason=pieces[-1].finish_reason, prompt=scored)


# ---- refusals ----


def _error_response(error: ApiError, *, headers: dict[str, str]) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers={**headers, **error.headers()})


async def _on_api_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError), error
    log.info("request.refused", path=http.url.path, status=error.status, code=error.code, error=error.message)
    return _error_response(error, headers={})


async def _on_http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    code = error.detail.lower().replace(" ", "_")  # not_found, method_not_allowed
    refusal = ApiError(f"{http.method} {http.url.path}: {error.detail}", status=error.status_code, code=code)
    return _error_response(refusal, headers=dict(error.headers or {}))


async def _on_crash(http: HttpRequest, error: Exception) -> Response:
    """What nobody foresaw: the client gets a sentence; the traceback is logged by the server above us."""
    log.error("request.crashed", path=http.url.path, error=type(error).__name__)
    return _error_response(ApiError("the replica failed; see its log", status=500, code="internal"), headers={})
