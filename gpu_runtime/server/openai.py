"""What clients may ask: the request schemas of OpenAI's completions and chat completions, closed and strict.

A field is supported, or ignored because it changes nothing here, or accepted only where it asks for nothing
(`best_of: 1` of a chat, `tools: []`), or refused by name. Nothing that would change the answer is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gpu_runtime.core import SamplingParams
from gpu_runtime.server.errors import ApiError, invalid
from registry.artifact.errors import ArtifactRefused
from registry.artifact.strict_json import load_object

MAX_PROMPTS = 64  # of one completions request: a longer list is for the client to cut
MAX_CHOICES = 128  # of one request, over all of its prompts: each is a request of its own to the engine
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 128
PROMPT_FORMS = "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, and not empty"
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default; chat defaults to the rest of the context

IGNORED = frozenset(
    "user metadata store safety_identifier service_tier prompt_cache_key prompt_cache_retention prompt_cache_options "
    "parallel_tool_calls".split()
)
# Known to clients and not supported: the values with which they ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
}
# In messages: what clients send back from an earlier reply.
MESSAGE_IGNORED = frozenset({"refusal", "annotations", "id"})

Asked = TypeVar("Asked", bound="GenerationRequest")
Prompt = str | tuple[int, ...]


class Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _stops(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


def _biases(value: object) -> object:
    """OpenAI's {"50256": -100} as {50256: -100.0}; JSON has no other keys than strings."""
    if not isinstance(value, Mapping):
        return value
    bad = next((key for key in value if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10)), None)
    if bad is not None:
        raise ValueError(f"logit_bias has the key {str(bad)[:40]!r}; its keys are token ids")
    return {int(key): bias for key, bias in value.items()}


Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class StreamOptions(Closed):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: accepted, not done


class GenerationRequest(Closed):
    """What both endpoints share. `model` is required by the protocol and decides nothing: the grant names the adapter."""

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopString], Field(max_length=4), BeforeValidator(_stops)] = Field(default_factory=list)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: Annotated[dict[int, Bias] | None, Field(max_length=MAX_BIASES), BeforeValidator(_biases)] = None
    deterministic: bool | None = None  # never in merged mode: bitwise the same whatever else is served

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_come_whole(self) -> GenerationRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError(
                f"prompt_logprobs is {self.prompt_logprobs} with stream true; chunks have no place for it: set stream to false"
            )
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        """Without `asked_tokens`; None is the rest of the context."""
        return None

    @property
    def num_logprobs(self) -> int | None:
        """None is off; n asks for the n likeliest tokens beside the chosen one."""
        return None

    @property
    def num_scored(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    @property
    def num_choices(self) -> int:
        """Of each prompt, as the reply shows them."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Of each prompt, as they are generated: the likeliest `num_choices` of them are shown."""
        return self.num_choices

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        """OpenAI's `top_p: 0` keeps the likeliest token alone, which is greedy."""
        greedy = self.top_p == 0
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if greedy or self.temperature == 0 else 1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if greedy or self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed & (2**63 - 1),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            min_tokens=self.min_tokens or 0,
            prompt_logprobs=self.num_scored,
            logprobs=self.num_logprobs if self.num_candidates == self.num_choices else self.num_logprobs or 0,
            ignore_eos=bool(self.ignore_eos),
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((self.logit_bias or {}).items()),
            deterministic=bool(self.deterministic),
        )


def _prompts(value: object) -> tuple[Prompt, ...]:
    """OpenAI's four spellings as one: string, strings, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError(PROMPT_FORMS)
    if _is_ids(value):
        return (tuple(value),)
    if all(isinstance(one, str) or _is_ids(one) for one in value):
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"prompt holds {len(value)} prompts; it may hold at most {MAX_PROMPTS}")
        return tuple(one if isinstance(one, str) else tuple(one) for one in value)
    raise ValueError(PROMPT_FORMS)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _best_of_holds_n(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.num_choices:
            raise ValueError(f"best_of is {self.best_of}, less than n, which is {self.num_choices}")
        if self.stream and self.num_candidates > self.num_choices:
            raise ValueError("best_of above n cannot be streamed: the best are known when all are whole")
        return self

    @model_validator(mode="after")
    def _choices_are_bounded(self) -> CompletionRequest:
        asked = len(self.prompt) * self.num_candidates
        if asked > MAX_CHOICES:
            raise ValueError(f"n (or best_of) times the number of prompts is {asked}; one request may ask for {MAX_CHOICES}")
        return self

    @property
    def default_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_scored(self) -> int | None:
        """`echo` with `logprobs` tells those of the prompt too."""
        echoed = self.logprobs if self.echo else None
        return max((count for count in (echoed, self.prompt_logprobs) if count is not None), default=None)

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices


def _content(value: object) -> object:
    """Text parts become one text, a line each; any other part is refused by its type."""
    if not isinstance(value, list):
        return value
    return "\n".join(_text_part(part) for part in value)


def _text_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(text, str):
        return text
    raise ValueError(f"content has a part of type {kind!r}; this model reads text parts only")


class Message(Closed):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forgive_nothings(cls, value: Any) -> Any:
        """Null fields, and those that only echo an earlier reply, say nothing."""
        if not isinstance(value, Mapping):
            return value
        if value.get("role") in ("tool", "function") or value.get("tool_calls") or value.get("function_call"):
            raise ValueError("the message belongs to a tool call; this model has no tools")
        return {key: one for key, one in value.items() if key == "content" or (one not in (None, [], {}) and key not in MESSAGE_IGNORED)}

    def for_template(self) -> dict[str, str]:
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content} | named


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _agree_with_each_other(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens name the same limit and differ; give max_completion_tokens alone")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read_request(body: bytes, *, kind: type[Asked]) -> Asked:
    """The body as a request of `kind`. Raises ApiError naming the field."""
    try:
        value = load_object(body, field="body")
    except ArtifactRefused as refusal:
        code = {"bad_json": "invalid_json"}.get(refusal.code, refusal.code)
        raise invalid(refusal.detail, param="body", code=code) from refusal
    try:
        return kind.model_validate(_supported(value, kind.model_fields))
    except ValidationError as error:
        raise _refusal(error) from error


def _supported(asked: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in asked.items():
        if name in fields or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise invalid(f"Unrecognized request argument supplied: {name[:100]}", param=name[:100], code="unknown_parameter")
        if value is not None and value not in NEUTRAL[name]:
            message = f"{name} is {repr(value)[:100]}; this server does not support it{_but(NEUTRAL[name])}"
            raise invalid(message, param=name, code="unsupported_parameter")
    return {name: value for name, value in asked.items() if name in fields}


def _but(allowed: Sequence[object]) -> str:
    return f" beyond {' or '.join(repr(one) for one in allowed)}" if allowed else ""


def _refusal(error: ValidationError) -> ApiError:
    """The first complaint, as OpenAI words it: where, what, and a code."""
    first = error.errors(include_url=False)[0]
    where = _path(first["loc"])
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return invalid(
            message if message.startswith(where) or not where else f"{where}: {message}", param=where or message.split(" ", 1)[0]
        )
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    code = {"extra_forbidden": "unknown_parameter"}.get(
        first["type"], "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    )
    return invalid(f"Invalid value for '{where}': {first['msg']}.", param=where, code=code)


def _path(loc: Sequence[int | str]) -> str:
    """('messages', 0, 'content') -> messages[0].content"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
