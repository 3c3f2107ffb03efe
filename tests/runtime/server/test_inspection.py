"""`/debug/state`: what it shows, that only the registry's inspection opens it, and that a look disturbs nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.kernels.sample import Sampled, SampleRow, sample
from registry.serving.grants import GrantSigner
from registry.wire import GRANT_HEADER, STATE_PATH, InspectionClaims
from tests.runtime.server.conftest import World
from tests.runtime.server.replica import BASE_DIGEST, REPLICA_ID, SIGNER, TENANT, Replica, engine_replica, grant, wait_until

BODY = {"model": "m", "prompt": "x", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
_numbers = itertools.count()


def inspection(*, signer: GrantSigner = SIGNER, **changes: Any) -> str:
    now = int(time.time())
    claims: dict[str, Any] = {"aud": REPLICA_ID, "jti": f"look-{next(_numbers)}", "iat": now, "exp": now + 10}
    return signer.sign(InspectionClaims.model_validate(claims | changes))


def unhurried(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """So that a request lasts for seconds."""
    time.sleep(0.02)
    return sample(logits, rows)


def look(replica: Replica, token: str) -> httpx2.Response:
    with httpx2.Client(trust_env=False) as http:
        return http.get(replica.url + STATE_PATH, headers={GRANT_HEADER: token} if token else {})


def test_only_an_inspection_opens_it_and_only_once(world: World, model_dir: Path) -> None:
    with engine_replica(model_dir) as replica:
        spent = inspection()
        assert look(replica, spent).status_code == 200
        refused = {
            "": "grant_missing",
            spent: "grant_replayed",
            grant(): "grant_malformed",
            inspection(aud="another"): "grant_audience",
            inspection(iat=1, exp=2): "grant_expired",
            inspection(signer=GrantSigner("another registry's secret")): "grant_signature",
        }
        for token, code in refused.items():
            answer = look(replica, token)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
        answer = replica.post("/v1/completions", BODY, token=inspection())
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "grant_malformed"), "an inspection is no grant"


def test_it_shows_pool_slots_tiers_queues_and_mode(world: World, model_dir: Path) -> None:
    source = LocalSource(base_digest=BASE_DIGEST)
    assert tuple(source.add(folder, tenant=TENANT) for folder in world.folders) == world.adapters
    adapter = world.adapters[0]
    with engine_replica(model_dir, source, sampler=unhurried) as replica:
        with replica.streaming("/v1/completions", BODY, token=grant(adapter)) as stream:
            lines = stream.iter_lines()
            next(lines)
            during = look(replica, inspection()).json()
        replica.wait_idle()
        after = look(replica, inspection()).json()
    assert [one["adapter"] for one in during["running"]["requests"]] == [adapter._asdict()]
    [slot] = during["slots"].values()
    assert (slot["form_digest"], slot["num_handles"], during["num_slots"]) == (adapter.form_digest, 1, 4)
    pool = during["pool"]
    assert pool["pages"]["adapter"] == slot["num_pages"]
    assert pool["pages"]["kv"] + pool["pages"]["prefix"] >= 1
    assert sum(pool["pages"].values()) == sum(run["count"] for run in pool["runs"]) == pool["num_pages"]
    assert during["first_token"]["requests"] == 1
    assert after["adapters"] == {"pool": 1, "host": 0, "disk": 0}
    assert after["merged"]["adapter"] is None
    [slot] = after["slots"].values()
    assert (after["running"]["total"], after["waiting"]["total"], slot["num_handles"]) == (0, 0, 0)


def test_who_asks_and_leaves_breaks_nothing(model_dir: Path) -> None:
    with engine_replica(model_dir) as replica:
        for _ in range(50):
            replica.loop.inspect().cancel()
        assert look(replica, inspection()).status_code == 200
        assert replica.post("/v1/completions", {**BODY, "max_tokens": 2}).status_code == 200


def test_a_stopped_engine_says_so(model_dir: Path) -> None:
    with engine_replica(model_dir) as replica:
        replica.loop.stop()
        wait_until(lambda: replica.loop.state().condition == "stopped")
        answer = look(replica, inspection())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
