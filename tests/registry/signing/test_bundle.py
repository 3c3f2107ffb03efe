"""What is read of `model.sig`: signatures of the real library, and everything that a stranger may write instead."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from registry.errors import Invalid
from registry.signing.bundle import Bundle, PublicKey
from tests.registry.signing.conftest import KeyPair, make_pair

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"# mine"}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
JSON = dict[str, Any]


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_the_library_signs_is_read(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    pair, other = make_pair(tmp_path / "a", curve), make_pair(tmp_path / "b", curve)
    bundle, key = Bundle.parse(pair.sign(FILES)), PublicKey.parse(pair.public)
    assert (bundle.files, bundle.hint) == (DIGESTS, key.fingerprint)
    assert key.fingerprint == hashlib.sha256((pair.folder / "key.pub").read_bytes()).hexdigest(), "as sha256sum says"
    assert bundle.is_by(key)
    assert not bundle.is_by(PublicKey.parse(other.public))
    bundle.require_files(DIGESTS)


def test_files_must_be_exactly_those_that_were_signed(pair: KeyPair) -> None:
    bundle = Bundle.parse(pair.sign(FILES))
    fewer = {name: digest for name, digest in DIGESTS.items() if name != "README.md"}
    cases = {
        "README.md was signed but is not there": fewer,
        "extra.json was not signed": DIGESTS | {"extra.json": "0" * 64},
        "README.md has other bytes": DIGESTS | {"README.md": "0" * 64},
    }
    for sentence, files in cases.items():
        with pytest.raises(Invalid, match=sentence) as refused:
            bundle.require_files(files)
        assert refused.value.error_code == "signature_mismatch"


def forge(pair: KeyPair, change: Callable[[JSON], object]) -> bytes:
    """A bundle of a good key over a statement that was changed, signed anew: only its content can be refused."""
    bundle = json.loads(pair.sign(FILES))
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    key = serialization.load_pem_private_key(pair.private_file.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    kind = b"application/vnd.in-toto+json"
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(key.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()
    return json.dumps(bundle).encode()


def rename(statement: JSON, name: str) -> None:
    statement["predicate"]["resources"][0]["name"] = name


STATEMENTS: dict[str, Callable[[JSON], object]] = {
    "another statement": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    "another predicate": lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
    "shards": lambda s: s["predicate"]["serialization"].update(method="shards"),
    "another hash": lambda s: s["predicate"]["resources"][0].update(algorithm="blake3"),
    "a digest that is none": lambda s: s["predicate"]["resources"][0].update(digest="00"),
    "a path that leaves": lambda s: rename(s, "../adapter_config.json"),
    "an absolute path": lambda s: rename(s, "/adapter_config.json"),
    "a backslash": lambda s: rename(s, "..\\adapter_config.json"),
    "a name in other letters": lambda s: rename(s, "\uff41dapter_config.json"),
    "a name that is a number": lambda s: s["predicate"]["resources"][0].update(name=7),
    "a file twice": lambda s: s["predicate"]["resources"].append(copy.deepcopy(s["predicate"]["resources"][0])),
    "a file twice by another spelling": lambda s: s["predicate"]["resources"].append(
        s["predicate"]["resources"][0] | {"name": "./" + s["predicate"]["resources"][0]["name"]}
    ),
    "too many files": lambda s: s["predicate"].update(resources=s["predicate"]["resources"] * 30),
    "no list": lambda s: s["predicate"].update(resources={"adapter_config.json": "0"}),
    "two subjects": lambda s: s.update(subject=s["subject"] * 2),
    "no subject": lambda s: s.update(subject=[]),
    "another root": lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
    "a file less under the old root": lambda s: s["predicate"]["resources"].pop(),
}


@pytest.mark.parametrize("change", STATEMENTS.values(), ids=STATEMENTS)
def test_statements_that_are_refused_whoever_signed_them(pair: KeyPair, change: Callable[[JSON], object]) -> None:
    with pytest.raises(Invalid) as refused:
        Bundle.parse(forge(pair, change))
    assert refused.value.error_code == "bad_signature_file"


def test_names_are_compared_without_a_leading_dot(pair: KeyPair) -> None:
    def dotted(statement: JSON) -> None:
        for resource in statement["predicate"]["resources"]:
            resource["name"] = "./" + resource["name"]

    Bundle.parse(forge(pair, dotted)).require_files(DIGESTS)


def edit(**fields: object) -> Callable[[JSON], bytes]:
    return lambda bundle: json.dumps(bundle | fields).encode()


def edit_envelope(**fields: object) -> Callable[[JSON], bytes]:
    return lambda bundle: json.dumps(bundle | {"dsseEnvelope": bundle["dsseEnvelope"] | fields}).encode()


BUNDLES: dict[str, Callable[[JSON], bytes]] = {
    "nothing": lambda _bundle: b"",
    "no JSON": lambda _bundle: b"\x80\x04pickle",
    "a list": lambda _bundle: b"[]",
    "a number": lambda _bundle: b"1" * 5000,
    "nested": lambda _bundle: b'{"a":' * 10_000,
    "too large": lambda bundle: json.dumps(bundle).encode() + b" " * 64 * 2**10,
    "a key twice": lambda bundle: b'{"mediaType": 1, ' + json.dumps(bundle).encode()[1:],
    "another version": edit(mediaType="application/vnd.dev.sigstore.bundle.v0.2+json"),
    "no material": edit(verificationMaterial=None),
    "a certificate": edit(verificationMaterial={"x509CertificateChain": {"certificates": []}}),
    "a hint that is none": edit(verificationMaterial={"publicKey": {"hint": ["a"]}}),
    "no envelope": edit(dsseEnvelope=[]),
    "another payload type": edit_envelope(payloadType="text/plain"),
    "no signature": edit_envelope(signatures=[]),
    "two signatures": lambda b: edit_envelope(signatures=b["dsseEnvelope"]["signatures"] * 2)(b),
    "a signature that is text": edit_envelope(signatures=["sig"]),
    "a signature out of base64": edit_envelope(signatures=[{"sig": "??"}]),
    "a signature out of ASCII": edit_envelope(signatures=[{"sig": "é"}]),
    "a payload out of base64": edit_envelope(payload="?"),
    "a payload that is no JSON": edit_envelope(payload="aGVsbG8="),
}


@pytest.mark.parametrize("make", BUNDLES.values(), ids=BUNDLES)
def test_bundles_that_are_refused(pair: KeyPair, make: Callable[[JSON], bytes]) -> None:
    with pytest.raises(Invalid) as refused:
        Bundle.parse(make(json.loads(pair.sign(FILES))))
    assert refused.value.error_code == "bad_signature_file"
    assert refused.value.detail.isprintable()


def test_a_signature_of_garbage_is_nobody_s(pair: KeyPair) -> None:
    bundle = json.loads(pair.sign(FILES))
    for garbage in (b"", b"\x30\x06\x02\x01\x00\x02\x01\x00", b"x" * 72):
        bundle["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(garbage).decode()}]
        assert not Bundle.parse(json.dumps(bundle).encode()).is_by(PublicKey.parse(pair.public))


def test_keys_that_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    def pem(key: Any) -> str:
        return str(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode())

    foreign = [pem(ed25519.Ed25519PrivateKey.generate()), pem(ec.generate_private_key(ec.SECP256K1()))]
    private = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for text in ("", "nonsense", private.decode(), "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", *foreign):
        with pytest.raises(Invalid) as refused:
            PublicKey.parse(text)
        assert refused.value.error_code == "bad_public_key"
        assert "PRIVATE" not in refused.value.detail
