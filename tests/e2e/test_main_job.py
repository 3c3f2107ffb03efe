"""Push -> gate -> resolve -> pull -> chat, over real processes, with the real base model and real adapters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from tests.conftest import ROOT
from tests.e2e.running import Lorary

ADAPTERS = ROOT / "tests" / "data" / "adapters"
PIRATE = ("Tell me about the old golden ship", "Arr, that old golden ship be a fine treasure, matey!")
JSON = ("Greta is 41 years old and owns a compass.", '{"name": "Greta", "age": 41, "owns": "compass"}')

pytestmark = pytest.mark.model


def push(lorary: Lorary, key: str, name: str, folder: Path) -> None:
    lorary.cli("adapters", "push", name, str(folder), key=key)


def ask(lorary: Lorary, key: str, model: str, question: str) -> str:
    with lorary.openai(key) as client:
        reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=32)
    assert reply.model == model
    return reply.choices[0].message.content or ""


def test_two_tenants_chat_with_their_adapters_and_the_base_in_one_batch(lorary: Lorary, tenant_name: Callable[[str], str]) -> None:
    ship, desk = lorary.make_tenant(tenant_name("ship")), lorary.make_tenant(tenant_name("desk"))
    push(lorary, ship, "pirate", ADAPTERS / "pirate")
    push(lorary, desk, "clerk", ADAPTERS / "json")
    questions = [(ship, "pirate", PIRATE[0]), (desk, "clerk", JSON[0]), (ship, "smollm2", PIRATE[0]), (desk, "smollm2", JSON[0])] * 3
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda q: ask(lorary, q[0], q[1], q[2]), questions))
    for (_, model, question), answer in zip(questions, answers, strict=True):
        if model == "pirate":
            assert answer == PIRATE[1]
        elif model == "clerk":
            assert answer == JSON[1]
        else:
            assert answer not in (PIRATE[1], JSON[1]), f"the base model answered {question!r} like an adapter"


def test_streaming_equals_not_streaming_and_counts_usage(lorary: Lorary, tenant_name: Callable[[str], str]) -> None:
    name = tenant_name("stream")
    key = lorary.make_tenant(name)
    lorary.cli("quotas", "set", name, "--tokens-per-minute", "100000", "--requests-per-minute", "100")
    push(lorary, key, "pirate", ADAPTERS / "pirate")
    messages: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": PIRATE[0]}]
    with lorary.openai(key) as client:
        chunks = list(
            client.chat.completions.create(
                model="pirate@1", messages=messages, temperature=0, max_tokens=32, stream=True, stream_options={"include_usage": True}
            )
        )
        whole = client.chat.completions.create(model="pirate", messages=messages, temperature=0, max_tokens=32)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == PIRATE[1]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    await_usage(lorary, key, requests=2, prompt=2 * usage.prompt_tokens, completion=2 * usage.completion_tokens)


def await_usage(lorary: Lorary, key: str, *, requests: int, prompt: int, completion: int) -> None:
    """The replica reports with its heartbeat; then the sums are exactly those of the replies, and so is the minute."""
    deadline = time.monotonic() + 30
    with lorary.http(key) as client:
        rows: list[dict[str, Any]] = []
        while sum(row["requests"] for row in rows) < requests:
            assert time.monotonic() < deadline, f"not reported in time: {rows}"
            time.sleep(0.2)
            rows = client.get("/api/v1/usage").json()["items"]
        quota = client.get("/api/v1/quota").json()
        assert (rows[0]["adapter"], rows[0]["cancelled"], rows[0]["failed"]) == ("pirate", 0, 0)
        assert (rows[0]["requests"], rows[0]["prompt_tokens"], rows[0]["completion_tokens"]) == (requests, prompt, completion)
    assert quota["tokens_per_minute"]["used"] <= prompt + completion, "settled: a minute may have passed, never more than was used"
    assert lorary.cli_json("usage", "--by", "adapter", key=key)[0]["prompt_tokens"] == prompt
    assert lorary.cli("usage", "--csv", key=key).stdout.splitlines()[1].count(",pirate,") == 1


def test_reply_carries_both_digests_and_the_request_id(lorary: Lorary, tenant_name: Callable[[str], str]) -> None:
    key = lorary.make_tenant(tenant_name("digest"))
    push(lorary, key, "pirate", ADAPTERS / "pirate")
    with lorary.http(key) as client:
        version = client.get("/api/v1/adapters/pirate/versions/1").json()
        reply = client.post(
            "/v1/completions", json={"model": "pirate", "prompt": "Ahoy", "max_tokens": 1}, headers={"X-Request-Id": "mine-1"}
        )
    assert reply.status_code == httpx2.codes.OK
    assert reply.headers["X-Lorary-Version-Digest"] == version["version_digest"]
    assert len(reply.headers["X-Lorary-Form-Digest"]) == 64
    assert reply.headers["X-Request-Id"]


def test_pushing_the_same_bytes_again_is_the_same_version(lorary: Lorary, tenant_name: Callable[[str], str]) -> None:
    key = lorary.make_tenant(tenant_name("again"))
    for _ in range(2):
        push(lorary, key, "pirate", ADAPTERS / "pirate")
    versions = lorary.cli_json("adapters", "show", "pirate", key=key)["versions"]
    assert [version["number"] for version in versions] == [1]


def test_pull_gives_back_the_bytes_that_were_pushed(lorary: Lorary, tenant_name: Callable[[str], str], tmp_path: Path) -> None:
    key = lorary.make_tenant(tenant_name("pull"))
    push(lorary, key, "pirate", ADAPTERS / "pirate")
    lorary.cli("adapters", "pull", "pirate", str(tmp_path / "out"), key=key)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (ADAPTERS / "pirate" / name).read_bytes()


def test_a_refused_push_says_why_and_leaves_nothing_to_chat_with(lorary: Lorary, tenant_name: Callable[[str], str], tmp_path: Path) -> None:
    key = lorary.make_tenant(tenant_name("refused"))
    config = json.loads((ADAPTERS / "pirate" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes((ADAPTERS / "pirate" / "adapter_model.safetensors").read_bytes())
    done = lorary.cli("adapters", "push", "dora", str(tmp_path), key=key, check=False)
    assert done.returncode == 1
    assert "use_dora" in done.stderr
    with pytest.raises(openai.NotFoundError):
        ask(lorary, key, "dora", "hello")


def test_revoked_key_and_deleted_adapter_stop_at_once_though_resident(lorary: Lorary, tenant_name: Callable[[str], str]) -> None:
    name = tenant_name("stop")
    key = lorary.make_tenant(name)
    push(lorary, key, "pirate", ADAPTERS / "pirate")
    second = lorary.make_key(name, "inference")
    assert ask(lorary, second, "pirate", PIRATE[0]) == PIRATE[1]
    with lorary.http(key) as client:
        key_id = next(item["id"] for item in client.get("/api/v1/keys").json()["items"] if item["scopes"] == ["inference"])
        client.delete(f"/api/v1/keys/{key_id}").raise_for_status()
    with pytest.raises(openai.AuthenticationError):
        ask(lorary, second, "pirate", PIRATE[0])
    with lorary.http(key) as client:
        client.delete("/api/v1/adapters/pirate").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        ask(lorary, key, "pirate", PIRATE[0])


def test_replica_refuses_a_request_without_a_grant(lorary: Lorary) -> None:
    with lorary.http() as client:
        replica = client.get("/api/v1/replicas").json()["items"][0]
    reply = httpx2.post(f"{replica['url']}/v1/completions", json={"model": "smollm2", "prompt": "hello", "max_tokens": 1}, timeout=30)
    assert reply.status_code == httpx2.codes.UNAUTHORIZED
    assert reply.json()["error"]["code"]
