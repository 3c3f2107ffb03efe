"""What schemathesis does beside its own checks, in its own environment: it imports nothing of Lorary.

LORARY_CONFORMANCE names a JSON file. `kept`: words of what the run needs, which nothing may revoke or delete. `seen`: where it
says which operations answered below 400, and which were compared. With `twins` the key is a stranger's: every path and body
names what another owner has, and each
request is sent once more with names and ids of nothing in their place: status and body must be the same, but for those words.
What is made anew differs by nature, so of answers below 300 only the status and the words of the owner are looked at.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import requests
import schemathesis

GIVEN: dict[str, Any] = json.loads(Path(os.environ["LORARY_CONFORMANCE"]).read_text())
PARAMETERS: dict[str, str] = GIVEN["parameters"]
TWINS: dict[str, str] = GIVEN["twins"]
SHARED = ("/api/v1/base-models/{name}",)
"""Whose names belong to nobody."""
TRIES = 3
IN_BODIES = {"model": "model", "sha256": "sha256", "token_secret": "name", "adapter": "adapter", "key_id": "key_id"}
OWN_WORDS = re.compile(r'"request_id": ?"[^"]*"|\b[0-9a-f]{32}\b|\d{4}-\d\d-\d\dT[0-9:.]+Z?')


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if TWINS and case.operation.path not in SHARED:
        _name_the_owners(case)
    for name, value in (case.path_parameters or {}).items():
        if case.method != "GET" and value in GIVEN["kept"]:
            case.path_parameters[name] = "0" * len(value)


def _name_the_owners(case: Any) -> None:
    """Instead of what was generated."""
    case.path_parameters = {name: PARAMETERS.get(name, value) for name, value in (case.path_parameters or {}).items()}
    for name in case.query or {}:
        case.query[name] = PARAMETERS.get(name, case.query[name])
    if isinstance(case.body, dict):
        for field, name in IN_BODIES.items():
            if field in case.body and name in PARAMETERS:
                case.body[field] = PARAMETERS[name]
        if isinstance(case.body.get("files"), dict) and "sha256" in PARAMETERS:
            case.body["files"] = dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), PARAMETERS["sha256"])


@schemathesis.check
class Seen:
    """Which operations were answered, so that a run that did nothing is not taken for one that found nothing."""

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.answered: set[str] = set()

    def after_response(self, ctx: Any, response: Any, case: Any) -> None:
        self.called.add(case.operation.label)
        if response.status_code < 400:
            self.answered.add(case.operation.label)

    def after_run(self, ctx: Any) -> None:
        _note("called", self.called)
        _note("answered", self.answered)


@schemathesis.check
class LooksLikeNothing:
    """What another owner has answers exactly as what nobody has."""

    def __init__(self) -> None:
        self.compared: set[str] = set()

    def after_response(self, ctx: Any, response: Any, case: Any) -> None:
        if not TWINS:
            return
        sent = _sent(response.request)
        recites = case.operation.path.startswith("/api/v1/audit")  # there a stranger reads what it asked for itself
        told = [word for word in GIVEN["sentences" if recites else "secrets"] if word in response.text and word not in sent]
        assert not told, f"the answer tells a stranger {told}"
        if not any(word in sent for word in TWINS):
            return
        self.compared.add(case.operation.label)
        found = _visible(response.status_code, response.text)
        for _ in range(TRIES):  # the first of two may be the last that a limit lets through
            ghost = _resend(response.request, TWINS)
            if found == ghost:
                return
            found = _resend(response.request, {})
        raise AssertionError(f"what exists answers {found}, what does not {ghost}")

    def after_run(self, ctx: Any) -> None:
        _note("compared", self.compared)


def _note(what: str, labels: set[str]) -> None:
    with Path(GIVEN["seen"]).open("a") as file:
        file.writelines(f"{what} {label}\n" for label in sorted(labels))


def _sent(request: requests.PreparedRequest) -> str:
    body = request.body or b""
    return unquote(request.url or "") + (body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body))


def _resend(request: requests.PreparedRequest, words: dict[str, str]) -> tuple[int, str]:
    again = request.copy()
    for word, twin in words.items():
        again.url = (again.url or "").replace(quote(word, safe=""), twin)
        if isinstance(again.body, bytes):
            again.body = again.body.replace(word.encode(), twin.encode())
        elif isinstance(again.body, str):
            again.body = again.body.replace(word, twin)
    with requests.Session() as session, session.send(again, timeout=30, allow_redirects=False, stream=True) as answer:
        text = answer.text if answer.status_code >= 400 else ""
        return _visible(answer.status_code, text)


def _visible(status: int, text: str) -> tuple[int, str]:
    if status < 400:
        return status, ""
    for number, (word, twin) in enumerate(TWINS.items()):
        text = text.replace(twin, f"<{number}>").replace(word, f"<{number}>")
    return status, OWN_WORDS.sub("*", text)
