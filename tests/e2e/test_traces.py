"""One trace from the front door to the replica, and one from a push to the worker: real processes, a real collector."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.running import Lorary
from tests.e2e.test_main_job import ADAPTERS, PIRATE, ask, push
from tests.otlp import Collector

pytestmark = [pytest.mark.model, pytest.mark.full]


def said(lorary: Lorary, process: str, event: str, *, trace_id: str) -> bool:
    """Whether a process logged `event` under that trace."""
    lines = (lorary.state_dir / "up.log").read_text(errors="replace").splitlines()
    return any(line.startswith(f"{process} |") and f" {event} " in line and f"trace_id={trace_id}" in line for line in lines)


def test_a_push_and_its_validation_are_one_trace_and_so_are_a_chat_and_its_generation(
    lorary: Lorary, otlp: Collector, tenant_name: Callable[[str], str]
) -> None:
    name = tenant_name("traced")
    key = lorary.make_tenant(name)
    with lorary.http() as client:
        tenant_id = client.get(f"/api/v1/tenants/{name}").json()["id"]
    push(lorary, key, "pirate", ADAPTERS / "pirate")
    job = otlp.wait_for(lambda one: one.name == "job validate_version" and one.attributes.get("lorary.tenant.id") == tenant_id)
    pushed = otlp.wait_for(lambda one: one.span_id == job.parent_id)
    assert (pushed.service, pushed.name, job.service) == ("lorary-registry", "POST /api/v1/adapters/{name}/versions", "lorary-worker")
    assert job.trace_id == pushed.trace_id
    assert job.attributes["lorary.job.outcome"] == "finished"

    assert ask(lorary, key, "pirate", PIRATE[0]) == PIRATE[1]
    generation = otlp.wait_for(lambda one: one.name == "chat pirate" and one.attributes["lorary.tenant.id"] == tenant_id)
    served = otlp.wait_for(lambda one: one.span_id == generation.parent_id)
    offered = otlp.wait_for(lambda one: one.span_id == served.parent_id)
    door = otlp.wait_for(lambda one: one.span_id == offered.parent_id)
    assert [one.service for one in (generation, served, offered, door)] == ["lorary-runtime"] * 2 + ["lorary-registry"] * 2
    assert len({one.trace_id for one in (generation, served, offered, door)}) == 1
    assert (offered.name, door.name, door.parent_id) == ("replica.offer", "POST /v1/chat/completions", "")
    told = generation.attributes
    assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("chat", "pirate")
    assert told["gen_ai.usage.input_tokens"] > 5
    assert told["gen_ai.usage.output_tokens"] > 5
    assert told["gen_ai.response.finish_reasons"] == ["stop"]
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 60
    assert len(told["lorary.form_digest"]) == 64

    for what, route in (("adapter.resolve", "POST /api/v1/resolve"), ("adapter.pull", "GET /api/v1/pull/{sha256}")):
        pulled = otlp.wait_for(lambda one, what=what: one.name == what and one.trace_id == generation.trace_id)  # type: ignore[misc]
        assert (pulled.service, pulled.parent_id) == ("lorary-runtime", generation.span_id), "a pull is part of who waits for it"
        answered = otlp.wait_for(lambda one, pulled=pulled: one.parent_id == pulled.span_id)  # type: ignore[misc]
        assert (answered.service, answered.name) == ("lorary-registry", route)

    for process, event in (("api", "http.request"), ("runtime.smollm2", "request.finished")):
        assert said(lorary, process, event, trace_id=generation.trace_id), f"{process} did not log {event} under the trace"
    assert said(lorary, "worker", "job.finished", trace_id=job.trace_id)
    for secret in (key, PIRATE[0], PIRATE[1], lorary.admin_key, "eyJhbGciOi"):
        assert secret.encode() not in otlp.raw, "a key, a prompt, an answer or a grant left in a span"
    assert not [one for one in otlp.spans() if one.attributes.get("url.path") in ("/livez", "/readyz")]
