"""Logprobs of prompts and what ends a text, as the real openai client sees them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.runtime.server.replica import Replica

PROMPT = "The quick brown fox jumps over the lazy dog while 😀 the old pirate"


def complete(replica: Replica, **asked: Any) -> Any:
    extra = {name: asked.pop(name) for name in list(asked) if name not in ("prompt", "echo", "logprobs", "n", "stop", "stream", "seed")}
    body = {"model": "m", "prompt": PROMPT, "temperature": 0, "extra_body": {"max_tokens": 5, "ignore_eos": True} | extra}
    return replica.client().completions.create(**{**body, **asked})


def test_echo_with_logprobs_tells_prompt_and_answer_in_one_list(replica: Replica) -> None:
    choice = complete(replica, echo=True, logprobs=2).choices[0]
    ids = replica.text.encode(PROMPT)
    told = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(told.top_logprobs) == len(ids) + 5
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert all(value < 0 for value in told.token_logprobs[1:])
    assert all(2 <= len(top) <= 3 for top in told.top_logprobs[1:])
    whole = {at: token for at, token in enumerate(told.tokens) if not token.startswith("bytes:")}
    assert all(choice.text[told.text_offset[at] :].startswith(token) for at, token in whole.items() if at < len(ids))
    assert told.text_offset == sorted(told.text_offset)


def test_a_prompt_that_holds_the_answer_scores_it_as_it_was_generated(replica: Replica) -> None:
    """Logprobs of greedy tokens, asked for as they come and afterwards as a prompt, are the same; a stream tells the same."""
    said = complete(replica, prompt=list(replica.text.encode(PROMPT)), logprobs=0)
    ids = [*replica.text.encode(PROMPT)]
    shown = complete(replica, prompt=ids, prompt_logprobs=1).choices[0].model_extra["prompt_logprobs"]
    assert shown[0] is None
    assert all(str(token) in one and one[str(token)]["rank"] >= 1 for token, one in zip(ids[1:], shown[1:], strict=True))
    whole = complete(replica, prompt=ids, echo=True, logprobs=0)
    tail = whole.choices[0].logprobs.token_logprobs[len(ids) :]
    assert tail == pytest.approx(said.choices[0].logprobs.token_logprobs, abs=1e-4)
    chunks = list(complete(replica, prompt=ids, echo=True, logprobs=0, stream=True))
    streamed = [value for chunk in chunks for value in (chunk.choices[0].logprobs.token_logprobs or [])]
    assert streamed == pytest.approx(whole.choices[0].logprobs.token_logprobs[:1] + whole.choices[0].logprobs.token_logprobs[1:], abs=1e-4)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_prompt_logprobs_of_a_chat_and_of_several_choices(replica: Replica) -> None:
    client = replica.client()
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "n": 2, "seed": 1}
    reply = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, extra_body={"prompt_logprobs": 2})
    told = reply.model_extra["prompt_logprobs"]
    assert (told[0], len(told)) == (None, reply.usage.prompt_tokens)
    assert all(2 <= len(one) <= 3 for one in told[1:])
    assert all(len(entry.top_logprobs) == 3 for choice in reply.choices for entry in choice.logprobs.content)
    both = complete(replica, prompt=["one", "two words"], n=2, echo=True, logprobs=1, seed=3)
    assert [choice.text.startswith(start) for choice, start in zip(both.choices, ("one", "one", "two", "two"), strict=True)] == [True] * 4
    assert both.choices[0].logprobs.token_logprobs[1] == both.choices[1].logprobs.token_logprobs[1]


def test_stops_by_token_and_string(replica: Replica) -> None:
    plain = complete(replica, max_tokens=12).choices[0].text
    ids = complete(replica, max_tokens=12, logprobs=0).choices[0].logprobs.tokens
    stop = plain[4:7]
    cut = complete(replica, max_tokens=12, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (plain[: plain.index(stop)], "stop")
    assert complete(replica, max_tokens=12, stop=[stop], include_stop_str_in_output=True).choices[0].text == plain[: plain.index(stop) + 3]
    late = complete(replica, max_tokens=12, stop=[stop], min_tokens=12).choices[0]
    assert (late.text, late.finish_reason) == (plain, "length")
    token = replica.text.encode(plain)[0]
    assert len(ids) == 12
    halted = complete(replica, max_tokens=12, stop_token_ids=[token], logit_bias={str(token): 100}).choices[0]
    assert (halted.text, halted.finish_reason) == ("", "stop")
    shown = complete(replica, max_tokens=12, stop_token_ids=[token], logit_bias={str(token): 100}, include_stop_str_in_output=True).choices[
        0
    ]
    assert shown.text == replica.text.decode([token])


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"min_tokens": 6}, "min_tokens"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(replica: Replica, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(replica, **asked)
    assert caught.value.param == param
    assert param in caught.value.message
