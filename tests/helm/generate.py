"""Writes what of the chart follows from the programs: the names of settings in values.schema.json, the table in README.md.

`python -m tests.helm.generate` after a setting or a value was added; a test says when it is due.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from gpu_runtime.config import RuntimeConfig
from registry.config import S3Settings, Settings

CHART = Path(__file__).resolve().parents[2] / "helm"
SCHEMA, VALUES, README = CHART / "values.schema.json", CHART / "values.yaml", CHART / "README.md"
TABLE = re.compile(r"(<!-- values -->\n).*?(<!-- /values -->)", re.DOTALL)

SET_BY_CHART = frozenset(
    {"state_dir", "database_url", "database_system_url", "database_owner_url", "secret_key", "secret_key_previous", "broker_url"}
    | {"public_url", "host", "port", "metrics_host", "metrics_port", "drain_delay_s", "worker_queues", "blob_url", "s3"}
    | {"database_busy_timeout_s"}  # SQLite's
)
S3_SET_BY_CHART = frozenset(
    {"endpoint_url", "public_endpoint_url", "region", "access_key_id", "secret_access_key", "addressing_style", "encryption", "kms_key_id"}
    | {"direct_uploads"}
)
RUNTIME_SET_BY_CHART = frozenset(
    {"model_dir", "registry_url", "replica_key_file", "public_url", "host", "port", "disk_cache_dir", "drain_s"}
)
RUNTIME_TYPES = {"int": "integer", "float": "number", "bool": "boolean"}
KEPT = ("type", "minimum", "maximum", "exclusiveMinimum", "pattern", "description")


def settings_schema() -> dict[str, dict[str, Any]]:
    """Settings that `settings` may hold, as properties of a JSON schema."""
    own = _properties(Settings, leave_out=SET_BY_CHART)
    s3 = _properties(S3Settings, leave_out=S3_SET_BY_CHART)
    return dict(sorted({**own, **{f"s3_{name}": schema for name, schema in s3.items()}}.items()))


def _properties(cls: type[Settings | S3Settings], *, leave_out: frozenset[str]) -> dict[str, dict[str, Any]]:
    secret = {name for name, field in cls.model_fields.items() if field.annotation is SecretStr}  # secrets come as files
    described = cls.model_json_schema()["properties"]
    return {name: _simple(schema) for name, schema in described.items() if name not in leave_out | secret}


def _simple(schema: dict[str, Any]) -> dict[str, Any]:
    """A list is one comma-separated text, as in the variable."""
    optional = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), {})
    kept = {key: value for key, value in {**optional, **schema}.items() if key in KEPT}
    return kept if kept.get("type") in {"integer", "number", "boolean", "string"} else {**kept, "type": "string"}


def runtime_schema() -> dict[str, dict[str, Any]]:
    named = {field.name: str(field.type) for field in fields(RuntimeConfig) if field.name not in RUNTIME_SET_BY_CHART}
    return {name: {"type": RUNTIME_TYPES.get(kind, "string")} for name, kind in sorted(named.items())}


def schema_text() -> str:
    schema = json.loads(SCHEMA.read_text())
    schema["definitions"]["settings"]["properties"] = settings_schema()
    schema["definitions"]["runtimeSettings"]["properties"] = runtime_schema()
    return json.dumps(schema, indent=2) + "\n"


@dataclass(frozen=True)
class Value:
    """One key of values.yaml that holds a value, as in api.replicas, with the comment above it."""

    name: str
    default: Any
    comment: str


def values() -> Iterator[Value]:
    """In the order of the file. Raises ValueError for a key without a comment."""
    path: list[str] = []
    comment: list[str] = []
    defaults = yaml.safe_load(VALUES.read_text())
    for line in VALUES.read_text().splitlines():
        if match := re.fullmatch(r"( *)# (.*)", line):
            comment.append(match[2])
        elif match := re.fullmatch(r"( *)([A-Za-z0-9]+):(.*)", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if match[3].strip():
                yield _value(path, defaults, comment)
            comment = []
        else:
            comment = []


def _value(path: list[str], defaults: Any, comment: list[str]) -> Value:
    name = ".".join(path)
    if not comment:
        raise ValueError(f"values.yaml: {name} has no comment above it")
    found = defaults
    for part in path:
        found = found[part]
    return Value(name, found, " ".join(comment))


def table() -> str:
    rows = [f"| `{value.name}` | `{json.dumps(value.default)}` | {_cell(value.comment)} |" for value in values()]
    return "\n".join(["| value | default | |", "|---|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def readme_text() -> str:
    return TABLE.sub(lambda match: f"{match[1]}{table()}{match[2]}", README.read_text())


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
    README.write_text(readme_text())
