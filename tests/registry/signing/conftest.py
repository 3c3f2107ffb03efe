"""The adapters' registry, key pairs, and the real `model_signing` as the signer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.registry.adapters.conftest import acme, base_model, globex, operator, work, worker
from tests.registry.adapters.pushing import Pusher

__all__ = ["acme", "base_model", "globex", "operator", "work", "worker"]


@dataclass(frozen=True)
class KeyPair:
    """A key pair on disk, `public` as it is registered."""

    folder: Path
    private_file: Path
    public: str

    def sign(self, files: Mapping[str, bytes]) -> bytes:
        """The bundle that `model_signing sign key` writes beside these files."""
        from model_signing import hashing, signing

        model, target = self.folder / "model", self.folder / "model.sig"
        model.mkdir(exist_ok=True)
        for old in model.iterdir():
            old.unlink()
        for name, data in files.items():
            (model / name).write_bytes(data)
        signing.Config().use_elliptic_key_signer(private_key=self.private_file).set_hashing_config(
            hashing.Config().set_ignored_paths(paths=[Path("model.sig")])
        ).sign(model, target)
        return target.read_bytes()

    def signed(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files with their signature."""
        return {**files, "model.sig": self.sign(files)}


def make_pair(folder: Path, curve: ec.EllipticCurve | None = None) -> KeyPair:
    folder.mkdir(parents=True)
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)
    return KeyPair(folder, folder / "key.pem", public.decode())


@pytest.fixture
def pair(tmp_path: Path) -> KeyPair:
    return make_pair(tmp_path / "pair")


@pytest.fixture
def trust() -> Callable[..., None]:
    """Registers a key and sets the policy."""

    def run(tenant: Pusher, key: KeyPair, *, name: str = "release", policy: str = "require") -> None:
        answer = tenant.call("POST", "/signing-keys", json={"name": name, "public_key": key.public})
        assert answer.status_code == 201, answer.text
        answer = tenant.call("PUT", "/signing-policy", json={"policy": policy})
        assert (answer.status_code, answer.json()["effective"]) == (200, policy), answer.text

    return run
