"""Requests and tokens a minute: what is reserved, settled and released adds up in any order, and is never exceeded."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from sqlalchemy import select, update

from registry.audit.service import record
from registry.db import Database, Table
from registry.quotas import rates, repository
from registry.quotas.models import RateWindow
from registry.quotas.rates import RateExceeded, RateLimits, Reservation
from registry.serving.demand import tokens_wanted
from registry.tenants import service as tenants
from registry.tenants.auth import SYSTEM


@pytest.fixture
def tenant_id(database: Database) -> str:
    with database.write() as session:
        made = tenants.create_tenant(session, subject=SYSTEM, name="acme", record=record).id
    wait_for_room(database)
    return made


def wait_for_room(database: Database) -> None:
    """Who counts within one minute begins with enough left of it."""
    with database.read() as session:
        left_s = repository.minute_of(session, "nobody").reset_s
    if left_s < 10:
        time.sleep(left_s + 0.01)


def reserve(database: Database, tenant_id: str, *, tokens: int = 0, **limits: int | None) -> Reservation:
    with database.write() as session:
        return rates.reserve(session, tenant_id, RateLimits(**({"requests": None, "tokens": None} | limits)), tokens=tokens)


def minute_passes(database: Database) -> None:
    with database.write() as session:
        session.execute(update(RateWindow).values(minute=RateWindow.minute - 1))


@pytest.mark.postgresql
def test_the_last_request_of_a_minute_and_the_first_of_the_next(database: Database, tenant_id: str) -> None:
    first = reserve(database, tenant_id, requests=2)
    assert abs(first.minute - time.time() / 60) < 2
    assert first.headers["RateLimit-Policy"] == '"requests";q=2;w=60'
    assert first.headers["RateLimit"].startswith('"requests";r=1;t=')
    reserve(database, tenant_id, requests=2)
    with pytest.raises(RateExceeded, match="2 requests a minute and 2 are used or reserved") as refused:
        reserve(database, tenant_id, requests=2)
    headers = refused.value.headers()
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert headers["RateLimit"] == f'"requests";r=0;t={headers["Retry-After"]}'
    assert refused.value.openai()["error"] == {
        "message": refused.value.detail, "type": "requests", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip
    minute_passes(database)
    assert reserve(database, tenant_id, requests=2).minute == first.minute


@pytest.mark.postgresql
def test_tokens_are_reserved_settled_and_released(database: Database, tenant_id: str) -> None:
    held = reserve_tokens(database, tenant_id, 70)
    with pytest.raises(RateExceeded, match="about 31; wait"):
        reserve_tokens(database, tenant_id, 31)
    with database.write() as session:
        rates.settle(session, tenant_id, minute=held.minute, difference=20 - 70)
    other = reserve_tokens(database, tenant_id, 80)
    assert '"tokens";r=0' in other.headers["RateLimit"]
    with database.write() as session:
        rates.release(session, other)
        assert repository.minute_of(session, tenant_id).tokens == 20
        rates.settle(session, tenant_id, minute=held.minute, difference=500)
    with pytest.raises(RateExceeded, match="520 are used"):
        reserve_tokens(database, tenant_id, 1)


def reserve_tokens(database: Database, tenant_id: str, tokens: int) -> Reservation:
    with database.write() as session:
        return rates.reserve(session, tenant_id, RateLimits(requests=None, tokens=100), tokens=tokens)


@pytest.mark.parametrize(
    ("limits", "tokens", "code"),
    [
        (RateLimits(requests=0, tokens=None), 1, "insufficient_quota"),
        (RateLimits(requests=None, tokens=0), 0, "insufficient_quota"),
        (RateLimits(requests=None, tokens=9), 10, "rate_limit_exceeded"),
    ],
)
def test_what_no_minute_has_room_for_is_not_told_to_wait(
    database: Database, tenant_id: str, limits: RateLimits, tokens: int, code: str
) -> None:
    with database.write() as session, pytest.raises(RateExceeded) as refused:
        rates.reserve(session, tenant_id, limits, tokens=tokens)
    assert refused.value.error_code == code
    assert "Retry-After" not in refused.value.headers()
    kind = refused.value.openai()["error"]["type"]
    assert kind == ("insufficient_quota" if code == "insufficient_quota" else "tokens")


@pytest.mark.postgresql
def test_many_at_once_never_exceed(database: Database, tenant_id: str) -> None:
    start = threading.Barrier(8)

    def ask(_number: int) -> int | None:
        start.wait()
        try:
            return reserve_tokens(database, tenant_id, 30).minute
        except RateExceeded:
            return None

    with ThreadPoolExecutor(8) as pool:
        minutes = [minute for minute in pool.map(ask, range(8)) if minute is not None]
    assert len(minutes) == 3
    assert len(set(minutes)) == 1


@pytest.mark.parametrize(
    ("asked", "limit", "tokens"),
    [
        ({"prompt": "x" * 9}, None, 3 + 16),
        ({"prompt": "x" * 9, "max_tokens": 5}, None, 3 + 5),
        ({"prompt": ["abcd", "ab"], "max_tokens": 10}, None, 2 + 20),
        ({"prompt": [1, 2, 3], "max_tokens": 0}, None, 3),
        ({"prompt": ["a", "b"], "max_tokens": 10, "n": 2, "best_of": 3}, None, 1 + 60),
        ({"prompt": "a", "max_tokens": 10, "n": -2}, None, 1 + 10),
        ({"prompt": [[1, 2], [3]], "max_tokens": 7}, None, 3 + 14),
        ({"messages": [{"role": "user", "content": "abcdefgh"}]}, None, 3 + 1024),
        ({"messages": [{"role": "user", "content": "abcdefgh"}]}, 100, 100),
        ({"messages": [{"role": "user", "content": "abcdefgh"}], "max_completion_tokens": 200}, 100, 203),
        ({"messages": [], "max_tokens": True}, None, 1024),
        ({"messages": {"a": [["é", None, 1.5]]}, "max_tokens": -4}, None, 1),
        ({}, None, 1024),
    ],
)
def test_what_a_request_may_use(asked: dict[str, Any], limit: int | None, tokens: int) -> None:
    assert tokens_wanted(asked, limit=limit) == tokens


class Minutes(RuleBasedStateMachine):
    """Reservations of one tenant, settled, released, forgotten, in any order and over minutes that pass.

    The model is a list of what each request of the current minute stands for; the row must be its sum.
    """

    held = Bundle("held")
    LIMITS = RateLimits(requests=6, tokens=1000)

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self.database = Database(f"sqlite:///{Path(self._folder.name) / 'db.sqlite3'}")
        Table.metadata.create_all(self.database.engine)
        with self.database.write() as session:
            self.tenant_id = tenants.create_tenant(session, subject=SYSTEM, name="acme", record=record).id
        self.minute: int | None = None
        self.tokens: dict[int, int] = {}
        self.passed = 0
        self.number = 0
        self.over = False  # the minute of `tokens` has passed, and nobody has asked since

    def teardown(self) -> None:
        self.database.close()
        self._folder.cleanup()

    @rule(target=held, tokens=st.integers(0, 400))
    def ask(self, tokens: int) -> tuple[int, Reservation, int]:
        self.number += 1
        full = len(self.tokens) >= 6 or sum(self.tokens.values()) + tokens > 1000
        try:
            with self.database.write() as session:
                made = rates.reserve(session, self.tenant_id, self.LIMITS, tokens=tokens)
        except RateExceeded:
            assert full, "refused though there was room"
            assert not self.over, "refused though a minute had passed"
            return self.number, Reservation(self.tenant_id, -1, tokens, {}), self.passed
        if made.minute != self.minute:  # the first one, one that a rule made pass, or a real one that passed meanwhile
            self.minute, self.tokens, self.over = made.minute, {}, False
        else:
            assert not full, "let in though the minute was full"
        self.tokens[self.number] = tokens
        return self.number, made, self.passed

    def _settle(self, one: tuple[int, Reservation, int], used: int) -> None:
        number, reservation, passed = one
        minute = reservation.minute - (self.passed - passed)  # rows were moved back instead of the clock forward
        with self.database.write() as session:
            rates.settle(session, self.tenant_id, minute=minute, difference=used - reservation.tokens)
        if number in self.tokens:
            self.tokens[number] = used

    @rule(one=consumes(held), used=st.integers(0, 600))
    def settle(self, one: tuple[int, Reservation, int], used: int) -> None:
        self._settle(one, used)

    @rule(one=consumes(held))
    def release(self, one: tuple[int, Reservation, int]) -> None:
        self._settle(one, 0)

    @rule(one=consumes(held))
    def nobody_settles(self, one: tuple[int, Reservation, int]) -> None:
        """The replica died: what was reserved stands until the minute ends."""

    @rule()
    def time_passes(self) -> None:
        minute_passes(self.database)
        self.passed += 1
        self.over = True
        if self.minute is not None:
            self.minute -= 1

    @invariant()
    def the_row_is_the_sum(self) -> None:
        with self.database.read() as session:
            row = session.scalars(select(RateWindow)).one_or_none()
        if row is not None:
            assert row.minute == self.minute
            assert (row.requests, row.tokens) == (len(self.tokens), sum(self.tokens.values()))


TestMinutes = Minutes.TestCase
TestMinutes.settings = settings(max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
