"""Clients of one tenant that do what their seed says, try again until they are answered, and remember what they were promised."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import httpx2

from tests.faults.plant import Plant
from tests.registry.adapters.pushing import adapter, nan_adapter, sha256

NAMES = ("pirate", "poet", "lawyer")
CONTENTS = [adapter(seed).files for seed in range(4)] + [nan_adapter(9).files]
PATIENCE_S = 60.0
MAX_OPERATIONS = 20


@dataclass
class Promises:
    """What was answered with success."""

    versions: set[tuple[str, int, str]] = field(default_factory=set)  # adapter, number, version digest
    blobs: set[str] = field(default_factory=set)
    uploads: set[str] = field(default_factory=set)
    revoked: set[str] = field(default_factory=set)


class Client:
    """One key of `tenant`, one thread."""

    def __init__(self, plant: Plant, *, tenant: str, token: str, seed: str) -> None:
        self.promises = Promises()
        self._plant, self._tenant, self._token = plant, tenant, token
        self._random = random.Random(seed)
        self._http = plant.client(token)

    def act(self, num_operations: int, over: Event) -> None:
        """So many operations, and more while things still break."""
        operations = [
            self.push,
            self.push,
            self.push,
            self.delete,
            self.delete_version,
            self.move,
            self.upload,
            self.key,
            self.ping,
            self.copy,
        ]
        with self._http:
            for number in range(MAX_OPERATIONS):
                if number >= num_operations and over.is_set():
                    return
                self._random.choice(operations)()

    def call(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """The first answer that is not an outage: what was asked may have happened before it."""
        deadline = time.monotonic() + PATIENCE_S
        said = ""
        while time.monotonic() < deadline:
            try:
                response = self._http.request(method, path, **options)
            except httpx2.TransportError as error:
                said = repr(error)
            else:
                if response.status_code < 500:
                    return response
                said = response.text
                assert response.status_code == 503, f"{method} {path}: {response.status_code} {said}"
            time.sleep(0.05)
        raise AssertionError(f"{method} {path}: no answer in {PATIENCE_S} s, at last {said}")

    def push(self) -> None:
        name, files = self._random.choice(NAMES), self._random.choice(CONTENTS)
        response = self.call("POST", f"/adapters/{name}/versions", json={"files": self._blobs(files)})
        assert response.status_code in {200, 201}, response.text
        pushed = response.json()
        self.promises.versions.add((name, pushed["number"], pushed["version_digest"]))

    def _blobs(self, files: Mapping[str, bytes]) -> dict[str, str]:
        for data in files.values():
            response = self.call("PUT", f"/blobs/{sha256(data)}", content=data)
            assert response.status_code in {200, 201}, response.text
            self.promises.blobs.add(sha256(data))
        return {path: sha256(data) for path, data in files.items()}

    def delete(self) -> None:
        assert self.call("DELETE", f"/adapters/{self._random.choice(NAMES)}").status_code in {204, 404}

    def delete_version(self) -> None:
        path = f"/adapters/{self._random.choice(NAMES)}/versions/{self._random.randint(1, 4)}"
        assert self.call("DELETE", path).status_code in {204, 404, 409}

    def move(self) -> None:
        path = f"/adapters/{self._random.choice(NAMES)}/aliases/{self._random.choice(('prod', 'default'))}"
        found = self.call("GET", path)
        condition = {"If-Match": found.headers["etag"]} if found.status_code == 200 else {"If-None-Match": "*"}
        response = self.call("PUT", path, json={"version": self._random.randint(1, 4)}, headers=condition)
        assert response.status_code in {200, 201, 404, 409, 412, 422}, response.text

    def upload(self) -> None:
        """In parts, one here: the job that finalises them is what may die."""
        data = self._random.randbytes(200_000)
        begun = self.call("POST", "/uploads", json={"sha256": sha256(data), "size": len(data)}).json()
        path = f"/uploads/{begun['id']}"
        sent = self.call("PUT", f"{path}/parts/1", content=data)
        assert sent.status_code in {200, 204}, sent.text
        completed = self.call("POST", f"{path}/complete")
        assert completed.status_code == 202, completed.text
        self.promises.uploads.add(sha256(data))

    def key(self) -> None:
        made = self.call("POST", "/keys", json={"name": "short", "scopes": ["inference"]})
        assert made.status_code == 201, made.text
        key_id = made.json()["id"]
        assert self.call("DELETE", f"/keys/{key_id}").status_code in {204, 404}
        self.promises.revoked.add(key_id)

    def ping(self) -> None:
        hooks = self.call("GET", "/webhooks").json()
        assert self.call("POST", f"/webhooks/{hooks[0]['id']}/ping").status_code == 202

    def copy(self) -> None:
        """An import from the registry itself, which answers as a hub."""
        secret = self.call("PUT", "/secrets/own", json={"value": self._token})
        assert secret.status_code in {200, 201, 204}, secret.text
        wanted = {
            "repo": f"{self._tenant}/{self._random.choice(NAMES)}",
            "name": "copy",
            "endpoint": self._plant.url,
            "token_secret": "own",
        }
        assert self.call("POST", "/imports", json=wanted).status_code == 202
