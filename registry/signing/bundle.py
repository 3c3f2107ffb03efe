"""Reads `model.sig`: a signature of OpenSSF model signing (OMS), made with a key. No network, no database.

    sigstore bundle v0.3            {mediaType, verificationMaterial: {publicKey: {hint}}, dsseEnvelope}
    `- DSSE envelope                {payload, payloadType, signatures: [{sig}]}, ECDSA over its pre-authentication encoding
       `- in-toto statement v1      {subject: [{digest: {sha256: over all digests below, in their order}}], predicate}
          `- predicate v1.0         {resources: [{name, algorithm, digest}], serialization: {method: "files"}}

The library that makes them (`model-signing`) verifies folders, and skips what the signature itself says to ignore. Here
the digests are known already and nothing may be ignored, so that one elliptic-curve check is all that is left: it needs
no part of the library, and a push is answered at once. Tests hold the two together.

https://github.com/sigstore/model-transparency, https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from registry.artifact.digest import is_digest
from registry.artifact.errors import ArtifactRefused, printable
from registry.artifact.gate import DEFAULT_LIMITS, SIGNATURE_FILE
from registry.artifact.manifest import MAX_FILES, require_safe_path
from registry.artifact.strict_json import load_object
from registry.errors import Invalid

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

# curve -> the name people know, and the hash that belongs to it in sigstore's algorithm registry
CURVES: dict[str, tuple[str, type[hashes.HashAlgorithm]]] = {
    "secp256r1": ("P-256", hashes.SHA256),
    "secp384r1": ("P-384", hashes.SHA384),
    "secp521r1": ("P-521", hashes.SHA512),
}

_Kind = TypeVar("_Kind", dict[str, Any], list[Any], str)


@dataclass(frozen=True)
class PublicKey:
    """`pem` is written anew, so that a key has one spelling; `fingerprint` is sha256 over it."""

    pem: str
    fingerprint: str
    curve: str
    key: ec.EllipticCurvePublicKey

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Raises Invalid for what is no public key on one of CURVES."""
        try:
            key = serialization.load_pem_public_key(text.encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise _bad_key("it is no public key in PEM") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
            raise _bad_key("it is not an elliptic-curve key on P-256, P-384 or P-521")
        return cls.of(key)

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> PublicKey:
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return cls(pem.decode(), hashlib.sha256(pem).hexdigest(), CURVES[key.curve.name][0], key)


@dataclass(frozen=True)
class Bundle:
    """A signature that is well-formed; whether it is good, `verify` and `require_files` say.

    `hint`: fingerprint of the key that made it, empty where an old signer wrote none. `files`: path -> sha256.
    """

    hint: str
    signature: bytes
    payload: bytes
    files: Mapping[str, str]

    @classmethod
    def parse(cls, data: bytes) -> Bundle:
        """Raises Invalid, and nothing else, for whatever the bytes may be."""
        try:
            return _parse(data)
        except ArtifactRefused as refused:
            raise _bad(f"{refused.field}: {refused.detail.partition(': ')[2].partition(';')[0]}") from refused

    def is_by(self, key: PublicKey) -> bool:
        """Whether `key` made the signature."""
        signed = b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(self.payload), self.payload)
        try:
            key.key.verify(self.signature, signed, ec.ECDSA(CURVES[key.key.curve.name][1]()))
        except InvalidSignature:
            return False
        return True

    def require_files(self, files: Mapping[str, str]) -> None:
        """`files`: path -> sha256 of everything but the signature. Raises Invalid unless they are exactly what was signed."""
        differences = [f"{path} was not signed" for path in sorted(files.keys() - self.files.keys())]
        differences += [f"{path} was signed but is not there" for path in sorted(self.files.keys() - files.keys())]
        differences += [f"{path} has other bytes" for path in sorted(files.keys() & self.files.keys()) if files[path] != self.files[path]]
        if differences:
            shown = ", ".join(differences)[:300]
            remedy = "sign exactly the files that you push: `lorary adapters push --sign KEYFILE` does"
            raise refuse("signature_mismatch", f"it was made for other files: {shown}", value=shown, remedy=remedy)


def refuse(code: str, problem: str, *, remedy: str, value: object = None) -> Invalid:
    return Invalid(f"{SIGNATURE_FILE}: {problem}; {remedy}", field=SIGNATURE_FILE, value=value, remedy=remedy, code=code)


def _bad(problem: str) -> Invalid:
    remedy = f"sign again: `model_signing sign key --signature {SIGNATURE_FILE} --private_key KEYFILE FOLDER`"
    return refuse("bad_signature_file", problem, remedy=remedy)


def _bad_key(problem: str) -> Invalid:
    remedy = "send what `openssl ec -in key.pem -pubout` prints, of a key on prime256v1, secp384r1 or secp521r1"
    return Invalid(f"public_key: {problem}; {remedy}", field="public_key", remedy=remedy, code="bad_public_key")


def _parse(data: bytes) -> Bundle:
    if len(data) > DEFAULT_LIMITS.signature_bytes:
        raise _bad(f"it has {len(data)} bytes, at most {DEFAULT_LIMITS.signature_bytes} are taken")
    bundle = load_object(data, field="bundle")
    _require(bundle, "mediaType", MEDIA_TYPE)
    envelope = _get(bundle, "dsseEnvelope", dict)
    _require(envelope, "payloadType", PAYLOAD_TYPE)
    signatures = _get(envelope, "signatures", list)
    if len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise _bad(f"it holds {len(signatures)} signatures, not one")
    payload = _decode(envelope, "payload")
    return Bundle(hint=_hint(bundle), signature=_decode(signatures[0], "sig"), payload=payload, files=_files(payload))


def _hint(bundle: Mapping[str, Any]) -> str:
    material = _get(bundle, "verificationMaterial", dict)
    if "publicKey" not in material:
        raise _bad("it was made with a certificate or by an identity provider, and only signatures by a key are verified here")
    hint = _get(material, "publicKey", dict).get("hint") or ""
    if hint and not is_digest(hint):
        raise _bad("publicKey.hint is no sha256")
    return str(hint)


def _files(payload: bytes) -> dict[str, str]:
    """path -> sha256 of what was signed."""
    statement = load_object(payload, field="payload")
    _require(statement, "_type", STATEMENT_TYPE)
    _require(statement, "predicateType", PREDICATE_TYPE)
    predicate = _get(statement, "predicate", dict)
    _require(_get(predicate, "serialization", dict), "method", "files")
    resources = _get(predicate, "resources", list)
    if len(resources) > MAX_FILES:
        raise _bad(f"it names {len(resources)} files, at most {MAX_FILES} are taken")
    files = dict(_resource(resource) for resource in resources)
    if len(files) != len(resources):
        raise _bad("it names a file twice")
    _require_root(statement, list(files.values()))
    return files


def _resource(resource: object) -> tuple[str, str]:
    if not isinstance(resource, dict):
        raise _bad("a resource is not an object")
    _require(resource, "algorithm", "sha256")
    name, digest = re.sub(r"^(\./)+", "", _get(resource, "name", str)), resource.get("digest")
    require_safe_path(name)
    if not is_digest(digest):
        raise _bad(f"the digest of {name} is no sha256")
    return name, str(digest)


def _require_root(statement: Mapping[str, Any], digests: list[str]) -> None:
    """One subject, whose digest is sha256 over all digests as they stand."""
    subjects = _get(statement, "subject", list)
    root = hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
    if len(subjects) != 1 or not isinstance(subjects[0], dict) or subjects[0].get("digest") != {"sha256": root}:
        raise _bad("its subject is not the digest of the files that it names")


def _get(value: Mapping[str, Any], key: str, kind: type[_Kind]) -> _Kind:
    found = value.get(key)
    if not isinstance(found, kind):
        raise _bad(f"{key} is not {'an object' if kind is dict else 'a list' if kind is list else 'a string'}")
    return found


def _require(value: Mapping[str, Any], key: str, wanted: str) -> None:
    if value.get(key) != wanted:
        raise _bad(f"{key} is {printable(value.get(key))[:80]}, not {wanted}")


def _decode(value: Mapping[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(_get(value, key, str), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(f"{key} is not base64") from error
