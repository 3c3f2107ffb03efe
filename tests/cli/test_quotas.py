"""`lorary quotas`: set by operators, shown to both."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Lorary


def test_limits_are_set_by_operators_and_shown_to_both(admin: Lorary, tenant: Lorary) -> None:
    name = tenant.ok("keys", "whoami")["tenant"]
    changed = admin.ok("quotas", "set", name, "--bytes", "10GiB", "--adapters", "7", "--running-jobs", "unlimited")
    assert (changed["bytes"]["limit"], changed["adapters"]["limit"], changed["running_jobs"]["limit"]) == (10 * 2**30, 7, None)
    assert tenant.ok("quotas", "show") == admin.ok("quotas", "show", name) == changed
    assert "unlimited" in tenant("quotas", "show").stdout
    back = admin.ok("quotas", "set", name, "--bytes", "default", "--adapters", "default", "--running-jobs", "default")
    assert {back[measure]["source"] for measure in ("bytes", "adapters", "running_jobs")} == {"default"}
    assert tenant("quotas", "set", name, "--bytes", "1").code == 1


@pytest.mark.parametrize("arguments", [(), ("--bytes", "many"), ("--bytes", "-1"), ("--adapters", "1.5")])
def test_what_is_no_limit_is_a_usage_error(admin: Lorary, arguments: tuple[str, ...]) -> None:
    assert admin("quotas", "set", "acme", *arguments).code == 2


def test_usage_of_nothing_is_an_empty_table_and_a_csv_of_names(tenant: Lorary) -> None:
    assert tenant.ok("usage", "--since", "2026-01-01", "--until", "2026-01-31", "--by", "key") == []
    csv = tenant("usage", "--csv", "--by", "day")
    assert csv.stdout.splitlines() == ["day,tenant,adapter,base_model,key_id,requests,cancelled,failed,prompt_tokens,completion_tokens"]
    assert tenant("usage", "--since", "yesterday").code == 1
