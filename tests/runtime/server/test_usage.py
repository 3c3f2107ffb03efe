"""What a replica reports of finished requests, and that it does until the registry has heard."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_runtime.server.usage import UsageBuffer
from registry.wire import MAX_FINISHED
from tests.registry.serving.conftest import World as Registry
from tests.registry.serving.conftest import closed_port_url, make_world, serving, wait_for
from tests.registry.usage.test_usage import claims, usage
from tests.runtime.server.replica import Replica, grant, wait_until
from tests.runtime.server.test_agent import make_agent


def reported(replica: Replica, num: int = 1) -> list[tuple[str, int, int]]:
    """(outcome, prompt tokens, completion tokens) of what waits, and empties it."""
    wait_until(lambda: len(replica.usage) >= num)
    found = [(one.outcome, one.num_prompt_tokens, one.num_completion_tokens) for one in replica.usage.batch()]
    replica.usage.settled()
    return found


@pytest.fixture
def quiet(replica: Replica) -> Replica:
    """The shared replica, with nothing to report from tests before."""
    replica.wait_idle()
    while replica.usage.batch():
        replica.usage.settled()
    return replica


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_counts_what_its_own_usage_says(quiet: Replica, stream: bool) -> None:
    body: dict[str, Any] = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "stream": stream}
    token = grant()
    answer = quiet.post("/v1/completions", body, token=token)
    assert answer.status_code == 200
    if not stream:
        used = answer.json()["usage"]
        assert (used["prompt_tokens"], used["completion_tokens"]) == (3, 4)
    wait_until(lambda: len(quiet.usage) == 1)
    (one,) = quiet.usage.batch()
    assert (one.grant, one.outcome, one.num_prompt_tokens, one.num_completion_tokens) == (token, "finished", 3, 4)
    assert 0 <= one.age_s < 5
    quiet.usage.settled()


def test_who_leaves_pays_for_what_was_generated(quiet: Replica) -> None:
    with quiet.streaming("/v1/completions", {"model": "m", "prompt": [1, 2, 3], "max_tokens": 200}) as response:
        next(response.iter_lines())
    ((outcome, prompt, completion),) = reported(quiet)
    assert (outcome, prompt) == ("cancelled", 3)
    assert 1 <= completion < 200


def test_refusals_use_nothing_and_what_was_not_admitted_is_not_reported(quiet: Replica) -> None:
    assert quiet.post("/v1/completions", {"model": "m", "prompt": [1] * 5000}).status_code == 400
    assert quiet.post("/v1/completions", {"model": "m", "prompt": [1]}, token="no grant").status_code == 401
    quiet.health.draining = True
    assert quiet.post("/v1/completions", {"model": "m", "prompt": [1]}).status_code == 503
    quiet.health.draining = False
    assert reported(quiet) == [("failed", 0, 0)]


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    made = make_world(tmp_path, heartbeat_interval_s=0.02)
    made.add_key("reader", tenant="acme", scopes=["usage:read"])
    yield made
    made.database.close()


def test_the_agent_reports_more_than_one_batch_also_after_an_outage(registry: Registry) -> None:
    buffer, url = UsageBuffer(), closed_port_url()
    agent = make_agent(registry, url, usage=buffer)
    agent.start()
    for _ in range(MAX_FINISHED + 7):
        buffer.add(registry.signer.sign(claims(registry, "before")), status=200, num_prompt_tokens=2, num_completion_tokens=1)
    buffer.add("no grant", status=200, num_prompt_tokens=2, num_completion_tokens=1)
    wait_for(lambda: agent.last_error)
    assert len(buffer) == MAX_FINISHED + 8
    with serving(registry.app, port=int(url.rpartition(":")[2])), httpx2.Client(base_url=url, trust_env=False) as http:
        wait_for(lambda: len(buffer) == 0)
        (row,) = usage(http, registry)  # type: ignore[arg-type]
        agent.stop()
    assert (row["requests"], row["prompt_tokens"]) == (MAX_FINISHED + 7, 2 * MAX_FINISHED + 14)


def test_what_ended_last_is_reported_before_the_replica_leaves(registry: Registry) -> None:
    buffer = UsageBuffer()
    with serving(registry.app) as url, httpx2.Client(base_url=url, trust_env=False) as http:
        agent = make_agent(registry, url, usage=buffer)
        agent.start()
        wait_for(lambda: agent.replica_id)
        assert agent.replica_id is not None
        buffer.add(registry.signer.sign(claims(registry, agent.replica_id)), status=200, num_prompt_tokens=2, num_completion_tokens=1)
        agent.stop()
        assert [row["requests"] for row in usage(http, registry)] == [1]  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["add", "batch", "settled"]), max_size=60))
def test_the_buffer_loses_only_its_oldest_and_only_when_full(steps: list[str]) -> None:
    buffer, waiting, taken, lost, number = UsageBuffer(max_waiting=5), deque[str](), 0, 0, 0
    for step in steps:
        if step == "add":
            number += 1
            buffer.add(str(number), status=500, num_prompt_tokens=0, num_completion_tokens=0)
            waiting.append(str(number))
            if len(waiting) > 5:
                waiting.popleft()
                taken, lost = max(0, taken - 1), lost + 1
        elif step == "batch":
            assert [one.grant for one in buffer.batch()] == list(waiting)
            taken = len(waiting)
        else:
            buffer.settled()
            waiting = deque(list(waiting)[taken:])
            taken = 0
        buffer.check_integrity()
        assert (len(buffer), buffer.num_lost) == (len(waiting), lost)
