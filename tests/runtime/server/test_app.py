"""The replica through the real openai client, over the real engine: replies, streams, stops, logprobs, adapters."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from gpu_runtime.server.replies import LOWEST_LOGPROB
from tests.runtime.server.conftest import World
from tests.runtime.server.replica import VERSION_DIGEST, Replica, grant

GREEDY = {"temperature": 0.0, "model": "what-the-client-says"}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about the old chest."}]


@pytest.fixture(scope="module")
def oracle(world: World) -> Any:
    """Greedy tokens of transformers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.model_dir, dtype=torch.float32).eval()

    def greedy(ids: tuple[int, ...], count: int) -> list[int]:
        tokens = list(ids)
        for _ in range(count):
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(ids) :]

    return greedy


def streamed_text(chunks: list[Any]) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def streamed_content(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_completion_is_the_models_own_and_says_who_it_was(replica: Replica, oracle: Any) -> None:
    raw = replica.client().completions.with_raw_response.create(prompt="The old pirate", **LONG)
    reply = raw.parse()
    prompt_ids = replica.text.encode("The old pirate")
    assert reply.choices[0].text == replica.text.decode(oracle(prompt_ids, 40))
    assert reply.choices[0].finish_reason == "length"
    assert reply.object == "text_completion"
    assert reply.model == "granted-name", "the grant names the model, not the body"
    assert reply.id == f"cmpl-{raw.headers['x-request-id']}"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt_ids), 40)
    assert reply.usage.total_tokens == len(prompt_ids) + 40
    assert "x-lorary-form-digest" not in raw.headers


def test_chat_is_the_models_own(replica: Replica, oracle: Any) -> None:
    reply = replica.client().chat.completions.create(messages=MESSAGES, **LONG)
    ids = replica.text.encode_chat(MESSAGES)
    assert reply.choices[0].message.content == replica.text.decode(oracle(ids, 40))
    assert reply.choices[0].message.role == "assistant"
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)


def test_a_completion_streams_to_the_same_text(replica: Replica) -> None:
    client = replica.client()
    whole = client.completions.create(prompt="今日は", **LONG)
    chunks = list(client.completions.create(prompt="今日は", stream=True, stream_options={"include_usage": True}, **LONG))
    assert streamed_text(chunks) == whole.choices[0].text
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 10, "it came in pieces"


def test_a_chat_streams_to_the_same_text(replica: Replica) -> None:
    client = replica.client()
    whole = client.chat.completions.create(messages=MESSAGES, **LONG)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **LONG))
    assert streamed_content(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_the_wire_of_a_stream(replica: Replica) -> None:
    body = {"model": "m", "prompt": "a", "max_tokens": 3, "temperature": 0, "stream": True, "ignore_eos": True}
    response = replica.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(replica: Replica, stream: bool) -> None:
    """Every substring of three characters, wherever the tokens' borders fall; nothing of it may be shown."""
    client = replica.client()
    full = client.completions.create(prompt="fox", **LONG).choices[0].text
    for start in range(0, len(full) - 3, 7):
        stop = full[start : start + 3]
        expected = full[: full.find(stop)]
        reply = client.completions.create(prompt="fox", stop=["never this", stop], stream=stream, **LONG)
        if stream:
            chunks = list(reply)
            shown, reason = streamed_text(chunks), chunks[-1].choices[0].finish_reason
        else:
            shown, reason = reply.choices[0].text, reply.choices[0].finish_reason
        assert (shown, reason) == (expected, "stop")


def test_a_stop_string_frees_the_engine_at_once(replica: Replica) -> None:
    reply = replica.client().completions.create(prompt="fox", **{**LONG, "max_tokens": 3000}, stop=["e"])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 500
    replica.wait_idle(within_s=1.0)


def test_the_end_of_sequence_token_ends_and_is_not_text(replica: Replica, oracle: Any) -> None:
    """Biased by sampling: some seed makes the tiny model say its end-of-sequence token within the limit."""
    client = replica.client()
    for seed in range(40):
        reply = client.completions.create(model="m", prompt="x", temperature=2.0, seed=seed, max_tokens=300, logprobs=0)
        if reply.choices[0].finish_reason == "stop":
            break
    assert reply.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in reply.choices[0].text
    assert reply.usage.completion_tokens == len(reply.choices[0].logprobs.tokens) + 1


def test_seeds_repeat_and_differ(replica: Replica) -> None:
    client = replica.client()

    def say(seed: int) -> str:
        return client.completions.create(model="m", prompt="The", max_tokens=20, temperature=1.5, seed=seed).choices[0].text

    assert say(7) == say(7)
    assert say(-7) == say(-7)
    assert len({say(seed) for seed in range(4)}) > 1


def test_top_p_zero_and_top_k_one_are_greedy(replica: Replica) -> None:
    client = replica.client()
    greedy = client.completions.create(prompt="The", **LONG).choices[0].text
    hot: dict[str, Any] = {"model": "m", "prompt": "The", "max_tokens": 40, "temperature": 2.0}
    assert client.completions.create(**hot, top_p=0, extra_body={"ignore_eos": True}).choices[0].text == greedy
    assert client.completions.create(**hot, extra_body={"ignore_eos": True, "top_k": 1}).choices[0].text == greedy


def test_prompts_of_every_spelling(replica: Replica) -> None:
    client = replica.client()
    ids = [list(replica.text.encode(prompt)) for prompt in ("The fox", "A chest")]
    texts = [client.completions.create(prompt=prompt, **LONG).choices[0].text for prompt in ("The fox", "A chest")]
    for prompts in (["The fox", "A chest"], ids):
        reply = client.completions.create(prompt=prompts, **LONG)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert [choice.text for choice in reply.choices] == texts
        assert reply.usage.prompt_tokens == sum(map(len, ids))
        assert reply.usage.completion_tokens == 80
    assert client.completions.create(prompt=ids[1], **LONG).choices[0].text == texts[1]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=ids, stream=True, **LONG):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(replica: Replica, stream: bool) -> None:
    client = replica.client()
    plain = client.completions.create(prompt=["The fox", "naïve"], **LONG)
    echoed = client.completions.create(prompt=["The fox", "naïve"], echo=True, stream=stream, **LONG)
    texts = [choice.text for choice in plain.choices]
    if stream:
        got = ["", ""]
        for chunk in echoed:
            for choice in chunk.choices:
                got[choice.index] += choice.text
    else:
        got = [choice.text for choice in echoed.choices]
    assert got == ["The fox" + texts[0], "naïve" + texts[1]]


# ---- logprobs ----


def test_chat_logprobs_spell_the_text(replica: Replica) -> None:
    client = replica.client()
    reply = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **LONG)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 40
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == reply.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob), "greedy takes the likeliest"
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob >= LOWEST_LOGPROB
    chunks = list(client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **LONG))
    streamed = [entry for chunk in chunks for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in entries]
    bare = client.chat.completions.create(messages=MESSAGES, logprobs=True, **LONG)
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[]] * 40


def test_completion_logprobs_point_into_the_text(replica: Replica) -> None:
    client = replica.client()
    choice = client.completions.create(prompt="今日", logprobs=2, **LONG).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 40
    for token, offset, logprob, top in zip(told.tokens, told.text_offset, told.token_logprobs, told.top_logprobs, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, offset) or token.startswith("<|")
        assert top[token] == logprob
        assert 2 <= len(top) <= 3


def test_logprobs_stop_where_the_text_stops(replica: Replica) -> None:
    client = replica.client()
    full = client.completions.create(prompt="fox", logprobs=0, **LONG).choices[0]
    stop = full.text[10:13]
    cut = client.completions.create(prompt="fox", logprobs=0, stop=stop, **LONG).choices[0]
    assert cut.text == full.text[: full.text.find(stop)]
    count = sum(offset < len(cut.text) for offset in full.logprobs.text_offset)
    assert cut.logprobs.tokens == full.logprobs.tokens[:count]
    chunks = list(client.completions.create(prompt="fox", logprobs=0, stop=stop, stream=True, **LONG))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == cut.logprobs.tokens


# ---- adapters ----


def test_the_grant_alone_chooses_the_adapter(world: World, replica: Replica) -> None:
    texts = {}
    for name, key in {"base": None, "first": world.adapters[0], "second": world.adapters[1]}.items():
        client = replica.client(key, model=f"model-of-{name}")
        raw = client.completions.with_raw_response.create(prompt="The fox", **{**LONG, "model": "second"})
        reply = raw.parse()
        texts[name] = reply.choices[0].text
        assert reply.model == f"model-of-{name}"
        assert raw.headers.get("x-lorary-form-digest") == (key.form_digest if key else None)
        assert raw.headers.get("x-lorary-version-digest") == (VERSION_DIGEST if key else None)
    assert len(set(texts.values())) == 3, "the adapters change what the model says"
    chunks = list(replica.client(world.adapters[0]).completions.create(prompt="The fox", stream=True, **LONG))
    assert streamed_text(chunks) == texts["first"]


def test_adapters_and_base_in_one_batch_say_what_they_say_alone(world: World, replica: Replica) -> None:
    from concurrent.futures import ThreadPoolExecutor

    clients = [replica.client(key) for key in (None, *world.adapters)]

    def say(at: int) -> str:
        return clients[at % 3].completions.create(prompt="The fox", **LONG).choices[0].text

    alone = [say(at) for at in range(3)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(say, range(12)))
    assert together == alone * 4


def test_an_unknown_adapter_is_refused_for_good(replica: Replica, world: World) -> None:
    stranger = world.adapters[0]._replace(form_digest="f" * 64)
    with pytest.raises(openai.BadRequestError, match="unknown here") as caught:
        replica.client(stranger).completions.create(prompt="x", **LONG)
    assert caught.value.code == "request_refused"
    assert caught.value.response.headers["x-request-id"]


# ---- limits ----


def test_chat_may_fill_the_context_and_the_grant(replica: Replica) -> None:
    reply = replica.client(max_tokens=30).chat.completions.create(messages=MESSAGES, **GREEDY, extra_body={"ignore_eos": True})
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 30
    long = [7] * 4090
    for max_tokens in (6, None):  # a default never asks for more than there is room for
        reply = replica.client().completions.create(prompt=long, **{**LONG, "max_tokens": max_tokens})
        assert reply.usage.total_tokens == 4096


def test_completions_default_to_sixteen_tokens(replica: Replica) -> None:
    assert replica.client().completions.create(prompt="a", **GREEDY, extra_body={"ignore_eos": True}).usage.completion_tokens == 16
    assert (
        replica.client(max_tokens=5).completions.create(prompt="a", **GREEDY, extra_body={"ignore_eos": True}).usage.completion_tokens == 5
    )


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(4090, 7), (4096, None)])
def test_too_long_for_the_context(replica: Replica, num_prompt: int, max_tokens: int | None) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens") as caught:
        replica.client().completions.create(model="m", prompt=[7] * num_prompt, max_tokens=max_tokens)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        replica.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "word " * 5000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_a_hopeless_prompt_is_not_even_encoded(replica: Replica) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        replica.client().completions.create(model="m", prompt="x" * 3_000_000)


def test_the_grants_limit_is_kept(replica: Replica) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 10") as caught:
        replica.client(max_tokens=10).completions.create(model="m", prompt="x", max_tokens=11)
    assert caught.value.param == "max_tokens"


def test_a_body_beyond_the_limit_is_refused(replica: Replica) -> None:
    response = replica.post("/v1/completions", b"[" + b" " * (4 * 2**20) + b"]")
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


def test_other_paths_and_methods_answer_in_openais_shape(replica: Replica) -> None:
    for path in ("/v1/embeddings", "/docs", "/openapi.json", "/v1/models"):
        response = replica.get(path)
        assert response.status_code == 404
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert replica.get("/v1/completions").status_code == 405


def test_a_deadline_must_be_a_number(replica: Replica) -> None:
    body = {"model": "m", "prompt": "a", "max_tokens": 1}
    response = replica.post("/v1/completions", body, headers={"X-Lorary-Deadline-Ms": "soon"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Lorary-Deadline-Ms")
    assert replica.post("/v1/completions", body, headers={"X-Lorary-Deadline-Ms": "60000"}).status_code == 200


def test_replies_are_json_of_known_length(replica: Replica) -> None:
    response = replica.post("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 2}, token=grant())
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    assert json.loads(response.content)["usage"]["completion_tokens"] <= 2


def test_n_choices_are_n_draws_and_the_first_is_the_one_of_a_single_request(replica: Replica) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": ["The old pirate", "今日は"], "max_tokens": 8, "temperature": 1.0, "seed": 11}
    single = replica.client().completions.create(**asked)
    several = replica.client().completions.create(n=3, **asked)
    assert [choice.index for choice in several.choices] == list(range(6))
    assert [several.choices[0].text, several.choices[3].text] == [choice.text for choice in single.choices]
    assert len({choice.text for choice in several.choices}) == 6
    assert single.usage is not None
    assert several.usage is not None
    assert several.usage.prompt_tokens == single.usage.prompt_tokens, "a prompt counts once"
    assert replica.client().completions.create(n=3, **asked).choices == several.choices


def test_chat_streams_n_choices_side_by_side(replica: Replica) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 6, "temperature": 1.0, "seed": 3, "n": 2}
    whole = replica.client().chat.completions.create(**asked)
    told = ["", ""]
    for chunk in replica.client().chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            told[choice.index] += choice.delta.content or ""
    assert told == [choice.message.content for choice in whole.choices]


def test_best_of_shows_the_likeliest_of_the_same_draws(replica: Replica) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": "The old pirate", "max_tokens": 8, "temperature": 1.0, "seed": 5}
    drawn = replica.client().completions.create(n=4, logprobs=0, **asked).choices
    likely = sorted(drawn, key=lambda choice: -sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))
    best = replica.client().completions.create(n=2, best_of=4, **asked)
    assert [choice.text for choice in best.choices] == [choice.text for choice in likely[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None, "nobody asked to see them"
    assert best.usage is not None
    assert best.usage.completion_tokens == 32, "what was generated counts, shown or not"


def test_a_bias_decides_and_one_on_a_token_that_is_not_there_is_refused(replica: Replica) -> None:
    asked: dict[str, Any] = {
        "model": "m",
        "prompt": "The old pirate",
        "max_tokens": 3,
        "temperature": 0.0,
        "extra_body": {"ignore_eos": True},
    }
    token_id = replica.text.encode("x")[0]
    forced = replica.client().completions.create(logit_bias={str(token_id): 100}, **asked)
    assert forced.choices[0].text == replica.text.decode([token_id] * 3)
    with pytest.raises(openai.BadRequestError, match="logit_bias names token id 999999"):
        replica.client().completions.create(logit_bias={"999999": 1}, **asked)


def test_the_grants_limit_is_one_for_all_choices_of_a_prompt(replica: Replica) -> None:
    with pytest.raises(openai.BadRequestError, match="of each of 128 choices"):
        replica.client().completions.create(model="m", prompt="a", n=128, max_tokens=64)
