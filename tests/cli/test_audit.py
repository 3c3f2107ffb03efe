"""`lorary audit`: the log as a table and as JSON Lines."""

from __future__ import annotations

import json

from tests.cli.conftest import Lorary


def test_the_log_is_listed_filtered_and_exported(tenant: Lorary) -> None:
    made = tenant.ok("keys", "create", "ci", "--scope", "adapters:read")
    tenant.ok("keys", "rotate", made["id"])
    (rotated,) = tenant.ok("audit", "list", "--resource", made["id"], "--action", "key.rotated")
    assert (rotated["address"], rotated["user_agent"].split("/")[0]) == ("127.0.0.1", "python-httpx2")
    assert len(tenant.ok("audit", "list", "--limit", "1")) == 1
    lines = [json.loads(line) for line in tenant("audit", "export", "--actor", rotated["key_id"]).stdout.splitlines()]
    assert [line["action"] for line in lines] == ["key.created", "key.created", "key.rotated"]
    rest = tenant("audit", "export", "--actor", rotated["key_id"], "--after", lines[1]["id"]).stdout
    assert json.loads(rest)["id"] == lines[2]["id"]
    assert tenant("audit", "export", "--since", "yesterday").code == 1
