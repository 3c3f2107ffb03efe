"""`push --sign`, `signing-keys` and `signing-policy`: a round trip of a signature is three commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from registry.artifact.base import BaseSpec
from tests.cli.conftest import Lorary
from tests.generate import generate_adapter

pytestmark = pytest.mark.usefixtures("base_model")


def write_keys(folder: Path, *, password: bytes | None = None) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher))
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """An adapter's folder beside whose files lie others, as in life."""
    spec = BaseSpec.from_config(json.loads((tiny_model_dir / "config.json").read_text()))
    folder = generate_adapter(spec, seed=5).write(tmp_path / "adapter")
    (folder / "README.md").write_text("# Mine\n")
    (folder / "optimizer.pt").write_bytes(b"not pushed")
    (folder / "checkpoint-1").mkdir()
    return folder


def test_sign_push_verify(tenant: Lorary, folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    assert tenant.ok("signing-keys", "add", "release", str(public))["curve"] == "P-256"
    assert tenant.ok("signing-policy", "set", "require")["effective"] == "require"
    unsigned = tenant("adapters", "push", "style", str(folder))
    assert unsigned.code == 1
    assert "--sign KEYFILE" in unsigned.stderr
    version = tenant.ok("adapters", "push", "style", str(folder), "--sign", str(private))
    assert (version["status"], version["signature"]["verdict"], version["signature"]["key"]) == ("ready", "verified", "release")
    assert b"optimizer" not in (folder / "model.sig").read_bytes()
    again = tenant.ok("adapters", "push", "style", str(folder), "--sign", str(private))
    assert again["number"] == 1, "a good signature is kept, so the bytes are the same"
    (folder / "README.md").write_text("# Changed\n")
    assert tenant.ok("adapters", "push", "style", str(folder), "--sign", str(private))["number"] == 2
    assert tenant.ok("adapters", "pull", "style@2", str(tmp_path / "pulled"))["number"] == 2
    from model_signing import verifying

    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(tmp_path / "pulled", tmp_path / "pulled" / "model.sig")
    assert tenant("signing-keys", "revoke", "release", "--yes").code == 0
    assert "release" in tenant("signing-keys", "list").stdout
    assert tenant.ok("adapters", "show", "style")["versions"][0]["signature"]["verdict"] == "key_revoked"
    card = tenant("adapters", "card", "style@2").stdout
    assert card.startswith("---\nbase_model: ")
    assert "**revoked**" in card
    assert "# Changed" in card
    assert tenant.ok("adapters", "card", "style")["signature"]["key"] == "release"
    assert tenant("signing-policy", "show").stdout.count("require") == 2


def test_keys_that_do_not_sign(tenant: Lorary, folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys", password=b"sesame")
    locked = tenant("adapters", "push", "style", str(folder), "--sign", str(private))
    assert (locked.code, "LORARY_SIGNING_KEY_PASSWORD" in locked.stderr) == (1, True)
    assert tenant("adapters", "push", "style", str(folder), "--sign", str(public)).code == 1
    wrong = tmp_path / "ed25519.pem"
    raw = ed25519.Ed25519PrivateKey.generate()
    wrong.write_bytes(raw.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    assert "not an elliptic-curve key" in tenant("adapters", "push", "style", str(folder), "--sign", str(wrong)).stderr
    assert not (folder / "model.sig").exists()
    tenant.ok("signing-keys", "add", "locked", str(public))
    tenant.ok("signing-policy", "set", "verify_if_present")
    opened = tenant.ok("adapters", "push", "style", str(folder), "--sign", str(private), LORARY_SIGNING_KEY_PASSWORD="sesame")
    assert opened["signature"]["key"] == "locked"
    assert tenant("signing-policy", "set", "require", "--floor").code == 1, "an operator's affair"
