"""From an HTTP request to engine requests: permission first, then the body, then tokens, then limits.

The order is the point: without a grant not a byte of the body is read, and nothing reaches the engine that could not
run there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from gpu_runtime.core import AdapterKey, Request, SamplingParams
from gpu_runtime.server.chat_template import ChatTemplateError
from gpu_runtime.server.errors import ApiError, invalid, unauthorised, unavailable
from gpu_runtime.server.grants import GrantRefused, GrantVerifier
from gpu_runtime.server.openai import ChatRequest, CompletionRequest, GenerationRequest, Prompt
from gpu_runtime.server.stream import ClientGone
from gpu_runtime.server.text import Text
from registry.wire import DEADLINE_HEADER, GRANT_HEADER, GrantClaims

MAX_BODY_BYTES = 4 * 2**20
BODY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Permission:
    """A verified grant: the token as it came, for pulls, and what it says."""

    token: str
    claims: GrantClaims

    @property
    def adapter(self) -> AdapterKey | None:
        """The grant alone decides which adapter answers; the body's `model` never does."""
        digest = self.claims.form_digest
        return None if digest is None else AdapterKey(self.claims.tenant, digest)


def admit(http: HttpRequest, *, verifier: GrantVerifier) -> Permission:
    """Raises ApiError 401 unless the request carries a good grant, and 503 where the verifier is out of memory for new ones."""
    token = http.headers.get(GRANT_HEADER, "")
    try:
        return Permission(token, verifier.verify(token))
    except GrantRefused as error:
        if error.reason == "overflow":
            raise unavailable(str(error), code="grant_overflow") from error
        raise unauthorised(str(error), code=f"grant_{error.reason}") from error


async def read_body(http: HttpRequest) -> bytes:
    """The whole body, within its limits of size and time. Raises ApiError, ClientGone."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in http.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="too_large")
    except TimeoutError as error:
        raise ApiError(f"the body took longer than {BODY_TIMEOUT_S:.0f} s to arrive", status=408, code="body_timeout") from error
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(body)


async def encode_prompts(asked: GenerationRequest, *, text: Text, context_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt. Long texts are encoded off the event loop; hopeless ones not at all. Raises ApiError."""
    return await asyncio.to_thread(_encode, asked, text, context_tokens)


def _encode(asked: GenerationRequest, text: Text, context_tokens: int) -> tuple[tuple[int, ...], ...]:
    if isinstance(asked, ChatRequest):
        return (_encode_chat(asked, text, context_tokens),)
    assert isinstance(asked, CompletionRequest), f"{type(asked).__name__} has no prompts"
    return tuple(_encode_prompt(prompt, text, context_tokens) for prompt in asked.prompt)


def _encode_chat(asked: ChatRequest, text: Text, context_tokens: int) -> tuple[int, ...]:
    messages = [message.for_template() for message in asked.messages]
    try:
        rendered = text.render_chat(messages)
    except ChatTemplateError as error:
        raise invalid(str(error), param="messages") from error
    _refuse_hopeless(rendered, text, context_tokens, param="messages")
    return text.encode(rendered, add_special_tokens=False)


def _encode_prompt(prompt: Prompt, text: Text, context_tokens: int) -> tuple[int, ...]:
    if isinstance(prompt, str):
        _refuse_hopeless(prompt, text, context_tokens, param="prompt")
        prompt = text.encode(prompt)
    if not prompt:
        raise invalid("prompt is empty; give at least one token", param="prompt")
    unknown = next((token_id for token_id in prompt if not 0 <= token_id < text.num_tokens), None)
    if unknown is not None:
        raise invalid(f"prompt holds token id {unknown}; this model's ids are 0 to {text.num_tokens - 1}", param="prompt")
    return prompt


def _refuse_hopeless(rendered: str, text: Text, context_tokens: int, *, param: str) -> None:
    """Even of the longest tokens this text would need more than fit: do not spend seconds to count them."""
    least = len(rendered.encode("utf-8", errors="surrogatepass")) // max(1, text.vocabulary.longest_bytes)
    if least > context_tokens:
        raise _too_long(least, 0, context_tokens, param=param)


def sampling_for(
    asked: GenerationRequest, prompts: Sequence[Sequence[int]], *, claims: GrantClaims, context_tokens: int
) -> tuple[SamplingParams, ...]:
    """Parameters of every candidate, a prompt's side by side, within the context and the grant. Raises ApiError."""
    asked_for = (_params(asked, len(prompt), claims=claims, context_tokens=context_tokens) for prompt in prompts)
    return tuple(_numbered(params, index) for params in asked_for for index in range(asked.num_candidates))


def _numbered(params: SamplingParams, index: int) -> SamplingParams:
    """Candidates of one seed draw different numbers, the first one those of a request for one."""
    return params if params.seed is None or not index else replace(params, seed=(params.seed + index) & (2**63 - 1))


def check_token_ids(asked: GenerationRequest, *, num_tokens: int) -> None:
    """Raises ApiError for a bias on, or a stop at, a token that this model does not have."""
    for param, token_ids in (("logit_bias", asked.logit_bias or {}), ("stop_token_ids", asked.stop_token_ids or ())):
        unknown = next((token_id for token_id in token_ids if token_id >= num_tokens), None)
        if unknown is not None:
            raise invalid(f"{param} names token id {unknown}; this model's ids are 0 to {num_tokens - 1}", param=param)


def _params(asked: GenerationRequest, num_prompt_tokens: int, *, claims: GrantClaims, context_tokens: int) -> SamplingParams:
    """The grant's limit is one for all candidates of a prompt together."""
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    room = context_tokens - num_prompt_tokens
    max_tokens, most = asked.asked_tokens, claims.max_tokens // asked.num_candidates
    if max_tokens is None:
        max_tokens = min(max(most, 1), asked.default_tokens or most, max(room, 1))
    if max_tokens > most:
        choices = f" of each of {asked.num_candidates} choices" if asked.num_candidates > 1 else ""
        raise invalid(f"max_tokens is {max_tokens}; this request may generate at most {most}{choices}", param="max_tokens")
    if max_tokens > room:
        raise _too_long(num_prompt_tokens, max_tokens, context_tokens, param=param)
    if (asked.min_tokens or 0) > max_tokens:
        message = f"min_tokens is {asked.min_tokens}, more than max_tokens, which is {max_tokens}: lower it or raise max_tokens"
        raise invalid(message, param="min_tokens")
    return asked.sampling(max_tokens=max_tokens)


def _too_long(num_prompt: int, num_completion: int, context_tokens: int, *, param: str) -> ApiError:
    message = (
        f"This model's maximum context length is {context_tokens} tokens. However, you requested at least {num_prompt + num_completion} "
        f"tokens ({num_prompt} in the {param}, {num_completion} in the completion). Please reduce the length of the {param} or completion."
    )
    return invalid(message, param=param, code="context_length_exceeded")


def deadline_of(http: HttpRequest, *, now_s: float, default_ms: int = 0) -> float | None:
    """For the first token, on the engine's clock: as long as the client will wait, or `default_ms` (0: for ever). Raises ApiError."""
    value = http.headers.get(DEADLINE_HEADER)
    if value is None:
        return now_s + default_ms / 1000 if default_ms else None
    if not (value.isascii() and value.isdigit()) or int(value[:12]) == 0:
        raise invalid(f"{DEADLINE_HEADER} is {value[:40]!r}; it must be a whole number of milliseconds above 0", param=DEADLINE_HEADER)
    return now_s + int(value[:12]) / 1000


def engine_requests(
    prompts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams], *, permission: Permission, deadline_s: float | None
) -> list[Request]:
    """One engine request a candidate of each prompt. A single one carries the request id itself, so that logs join by it."""
    base = permission.claims.jti
    names = [base] if len(params) == 1 else [f"{base}-{index}" for index in range(len(params))]
    candidates = len(params) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(candidates)]
    now_s = time.monotonic()
    return [
        Request(name, prompt, one, permission.adapter, arrived_s=now_s, deadline_s=deadline_s, tenant=permission.claims.tenant)
        for name, prompt, one in zip(names, repeated, params, strict=True)
    ]
