"""The contract between registry and replicas does not change by accident."""

from __future__ import annotations

import hashlib
import json

import pytest

from registry import wire
from registry.wire import WIRE_VERSION, WireVersionMismatch, require_wire_version

MESSAGES = (
    wire.ReplicaRegistration, wire.ReplicaWelcome, wire.Heartbeat, wire.HeartbeatReply, wire.ResolveRequest, wire.FormDescription,
    wire.GrantClaims, wire.UsageReport, wire.UsageReply,
)  # fmt: skip

# version -> digest of what it looks like. A change of the messages needs a new WIRE_VERSION and a new line here;
# releases have been made with the lines above the last one, so those are never edited.
SHAPES = {
    1: "e51941d142c049346af098ddf445062f51c52ce698bc2fee4d35254681418edf",
    2: "7bdefba9e9468f546a95b449f453f9675daa2125b6f9ec95f01eec6581be76e7",
}


def shape() -> str:
    """Fields, types and bounds of every message, without prose."""

    def strip(node: object) -> object:
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items() if key not in ("description", "title")}
        return [strip(item) for item in node] if isinstance(node, list) else node

    schemas = [strip(message.model_json_schema()) for message in MESSAGES]
    headers = [
        wire.GRANT_HEADER,
        wire.REPLICAS_PATH,
        wire.RESOLVE_PATH,
        wire.PULL_PATH,
        wire.USAGE_PATH,
        wire.GRANT_ALGORITHM,
        wire.GRANT_ISSUER,
    ]
    return hashlib.sha256(json.dumps([schemas, headers], sort_keys=True).encode()).hexdigest()


def test_the_messages_of_this_version_are_what_they_were() -> None:
    assert SHAPES[WIRE_VERSION] == shape(), "the wire contract changed: raise WIRE_VERSION and add its shape"
    assert max(SHAPES) == WIRE_VERSION


@pytest.mark.parametrize(
    "message", [None, [], "1", {}, {"wire_version": None}, {"wire_version": "1"}, {"wire_version": WIRE_VERSION + 1}, {"wire_version": 1.5}]
)
def test_a_message_must_say_our_version(message: object) -> None:
    with pytest.raises(WireVersionMismatch, match=f"this side speaks {WIRE_VERSION}"):
        require_wire_version(message)


def test_every_message_says_its_version_when_it_is_sent() -> None:
    sent = wire.Heartbeat(sequence=1, state="ready", num_queued=0, num_running=0, num_free_pages=0).model_dump(mode="json")
    require_wire_version(sent)


def test_messages_are_frozen_and_closed() -> None:
    for message in MESSAGES:
        assert message.model_config["frozen"], message
        assert message.model_config["extra"] == "forbid", message
