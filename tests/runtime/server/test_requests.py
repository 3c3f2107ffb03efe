"""What may be asked: every field accepted, ignored, neutral or refused by name, and the openai client's exception for it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from gpu_runtime.server.errors import ApiError
from gpu_runtime.server.openai import IGNORED, NEUTRAL, ChatRequest, CompletionRequest, read_request
from tests.runtime.server.replica import Replica

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**changes: Any) -> ChatRequest:
    return read_request(json.dumps(CHAT | changes).encode(), kind=ChatRequest)


def completion(**changes: Any) -> CompletionRequest:
    return read_request(json.dumps(COMPLETION | changes).encode(), kind=CompletionRequest)


def refusal(kind: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode(), kind=kind)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_openais() -> None:
    params = chat().sampling(max_tokens=9)
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.stop, params.logprobs) == (1.0, 1.0, 0, None, (), None)
    assert params.max_tokens == 9
    assert not params.ignore_eos


def test_null_means_not_given() -> None:
    nothing = dict.fromkeys(
        "temperature top_p max_tokens max_completion_tokens n seed stop stream stream_options logprobs top_logprobs tools user".split()
    )
    assert chat(**nothing).sampling(max_tokens=1) == chat().sampling(max_tokens=1)


def test_what_is_ignored_and_what_asks_for_nothing_is_taken() -> None:
    chat(**dict.fromkeys(IGNORED, "anything"))
    chat(**{name: values[0] for name, values in NEUTRAL.items() if values})
    completion(**{name: values[0] for name, values in NEUTRAL.items() if values})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("suffix", "end"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    error = refusal(ChatRequest, CHAT | {name: value})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert name in error.message


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"max_token": 5}, "max_token", "unknown_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 10**30}, "max_tokens", None),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"nonsense": 1}}, "stream_options.nonsense", "unknown_parameter"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"model": ""}, "model", "invalid_value"),
        ({"model": None}, "model", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", None),
    ],
)
def test_bad_chat_fields_are_named(changes: dict[str, Any], param: str, code: str | None) -> None:
    error = refusal(ChatRequest, CHAT | changes) if "max_tokens" not in changes or changes["max_tokens"] != 10**30 else None
    if error is None:
        assert chat(**changes).asked_tokens == 10**30  # the context refuses it, with its own words
        return
    assert error.param == param
    assert code is None or error.code == code
    assert error.message


@pytest.mark.parametrize("prompt", [None, "", [], 5, [""], {}, [[]], [1, "a"], [1.5], [True], ["a"] * 65, [["a"]]])
def test_bad_prompts_are_refused(prompt: object) -> None:
    if prompt in ("", [""]):
        assert completion(prompt=prompt).prompt == ("",)  # an empty text may still encode to a token: the tokenizer decides
        return
    assert refusal(CompletionRequest, COMPLETION | {"prompt": prompt}).param == "prompt"


def test_missing_fields_are_named() -> None:
    assert refusal(CompletionRequest, {"model": "m"}).code == "missing_required_parameter"
    assert refusal(ChatRequest, {"messages": CHAT["messages"]}).param == "model"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"a":"\\ud800"}'])
def test_bodies_that_are_no_object(body: bytes) -> None:
    assert refusal(ChatRequest, body).code in {"invalid_json", "unknown_parameter"}


def test_a_key_that_stands_twice_is_named() -> None:
    error = refusal(ChatRequest, b'{"model": "a", "model": "b"}')
    assert error.code == "duplicate_key"
    assert "model" in error.message


def test_echo_with_logprobs_scores_the_prompt() -> None:
    assert completion(echo=True, logprobs=2).sampling(max_tokens=1).prompt_logprobs == 2
    assert completion(echo=True, logprobs=2, prompt_logprobs=5).sampling(max_tokens=1).prompt_logprobs == 5
    assert completion(logprobs=2).sampling(max_tokens=1).prompt_logprobs is None
    assert chat(prompt_logprobs=0).sampling(max_tokens=1).prompt_logprobs == 0


def test_messages_reach_the_template_as_text() -> None:
    asked = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "user", "content": "", "name": "Ann"},
            # what `reply.choices[0].message.model_dump()` gives back
            {
                "role": "assistant",
                "content": "ok",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "tool_calls": None,
                "function_call": None,
            },
        ]
    )
    assert [message.for_template() for message in asked.messages] == [
        {"role": "system", "content": "one\ntwo"},
        {"role": "user", "content": "", "name": "Ann"},
        {"role": "assistant", "content": "ok"},
    ]


def test_max_completion_tokens_is_the_newer_name() -> None:
    assert chat(max_completion_tokens=7).asked_tokens == 7
    assert chat(max_tokens=7).asked_tokens == 7
    assert chat(max_tokens=7, max_completion_tokens=7).asked_tokens == 7
    assert chat().asked_tokens is None


# ---- over the wire ----


def test_refusals_are_the_clients_exceptions(replica: Replica) -> None:
    client = replica.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], verbosity="low")
    assert (caught.value.param, caught.value.code, caught.value.type) == ("verbosity", "unsupported_parameter", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="x", extra_body={"max_token": 3})
    assert caught.value.param == "max_token"
    with pytest.raises(openai.BadRequestError, match="ids are 0 to") as caught:
        client.completions.create(model="m", prompt=[1, 10**6])
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.completions.create(model="m", prompt="")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=0)


def test_every_sampling_parameter_reaches_the_engine() -> None:
    given = {
        "min_p": 0.1,
        "frequency_penalty": 1,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"50256": -100, "7": 2.5},
        "deterministic": True,
        "stop_token_ids": [3, 4],
        "include_stop_str_in_output": True,
        "min_tokens": 1,
    }
    params = chat(**given).sampling(max_tokens=1)
    assert (params.min_p, params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.1, 1.0, -0.5, 1.2)
    assert params.logit_bias == ((50256, -100.0), (7, 2.5))
    assert params.deterministic
    assert (params.stop_token_ids, params.include_stop, params.min_tokens) == ((3, 4), True, 1)
    assert not chat().sampling(max_tokens=1).deterministic


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"n": 100, "prompt": ["a", "b"]}, "n"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"7": 101}}, "logit_bias[7]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
    ],
)
def test_what_cannot_be_asked_of_choices_and_logits_is_named(asked: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, COMPLETION | asked).param == param
