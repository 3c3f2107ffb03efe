"""A replica serves only what its registry has signed, for it, now, and once."""

from __future__ import annotations

import threading

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpu_runtime.server.grants import GrantRefused, GrantVerifier
from registry.errors import Forbidden
from registry.serving.grants import GrantSigner, signer_for
from registry.wire import GrantClaims

NOW = 1_800_000_000.0
SIGNER = GrantSigner("a secret of the registry")


def claims(**changes: object) -> GrantClaims:
    values: dict[str, object] = {
        "aud": "replica-1",
        "jti": "request-1",
        "iat": int(NOW),
        "exp": int(NOW) + 30,
        "tenant": "t" * 32,
        "model": "pirate",
        "version_digest": "a" * 64,
        "form_digest": "b" * 64,
        "max_tokens": 100,
        "key_id": "k",
    }
    return GrantClaims.model_validate(values | changes)


def verifier(**options: object) -> GrantVerifier:
    return GrantVerifier("replica-1", SIGNER.public_keys, leeway_s=5.0, **options)  # type: ignore[arg-type]


def refusal(checker: GrantVerifier, token: str | None, *, now: float = NOW) -> str:
    with pytest.raises(GrantRefused) as caught:
        checker.verify(token, now=now)
    return caught.value.reason


def test_a_good_grant_gives_its_claims_and_the_base_model_has_no_digests() -> None:
    assert verifier().verify(SIGNER.sign(claims()), now=NOW) == claims()
    base = claims(version_digest=None, form_digest=None)
    assert verifier().verify(SIGNER.sign(base), now=NOW) == base


@pytest.mark.parametrize(
    ("changes", "now", "reason"),
    [
        ({"aud": "replica-2"}, NOW, "audience"),
        ({}, NOW + 36, "expired"),
        ({"iat": int(NOW) + 60, "exp": int(NOW) + 90}, NOW, "future"),
    ],
)
def test_what_is_not_for_here_and_now_is_refused(changes: dict[str, object], now: float, reason: str) -> None:
    assert refusal(verifier(), SIGNER.sign(claims(**changes)), now=now) == reason


def test_clock_skew_within_the_leeway_is_allowed_on_both_sides() -> None:
    assert verifier().verify(SIGNER.sign(claims()), now=NOW + 34)
    assert verifier().verify(SIGNER.sign(claims()), now=NOW - 4)


def test_missing_garbled_and_foreign_grants_are_refused() -> None:
    assert refusal(verifier(), None) == "missing"
    assert refusal(verifier(), "") == "missing"
    assert refusal(verifier(), "not.a.token") == "malformed"
    assert refusal(verifier(), GrantSigner("another secret").sign(claims())) == "signature"
    token = SIGNER.sign(claims())
    head, _, signature = token.split(".")
    forged = jwt.encode(claims(tenant="u" * 32).model_dump(exclude_none=True), "k" * 32, algorithm="HS256").split(".")[1]
    assert refusal(verifier(), f"{head}.{forged}.{signature}") == "signature"


def test_the_algorithm_is_pinned() -> None:
    """Neither `none`, nor HMAC with the public key as secret, nor another curve passes."""
    payload = claims().model_dump(exclude_none=True)
    assert refusal(verifier(), jwt.encode(payload, None, algorithm="none")) == "malformed"
    assert refusal(verifier(), jwt.encode(payload, "x" * 64, algorithm="HS256")) == "malformed"
    ec_key = generate_ec_key(SECP256R1())
    assert refusal(verifier(), jwt.encode(payload, ec_key, algorithm="ES256")) == "malformed"
    pem = ec_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ValueError, match="only Ed25519"):
        GrantVerifier("replica-1", [pem])
    with pytest.raises(ValueError, match="not PEM"):
        GrantVerifier("replica-1", ["hello"])


def test_unknown_claims_are_refused() -> None:
    token = jwt.encode(claims().model_dump(exclude_none=True) | {"admin": True}, SIGNER._private, algorithm="EdDSA")
    assert refusal(verifier(), token) == "malformed"


def test_a_grant_is_good_once() -> None:
    checker = verifier()
    checker.verify(SIGNER.sign(claims()), now=NOW)
    assert refusal(checker, SIGNER.sign(claims())) == "replayed"
    assert refusal(checker, SIGNER.sign(claims(model="other name"))) == "replayed"


def test_many_threads_use_a_grant_once_between_them() -> None:
    checker, token = verifier(), SIGNER.sign(claims())
    wins: list[GrantClaims] = []
    losses: list[str] = []

    def use() -> None:
        try:
            wins.append(checker.verify(token, now=NOW))
        except GrantRefused:
            losses.append(token)

    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wins), len(losses)) == (1, 15)


def test_memory_is_bounded_and_nothing_alive_is_forgotten() -> None:
    checker = verifier(max_remembered=3)
    for number in range(3):
        checker.verify(SIGNER.sign(claims(jti=f"r{number}")), now=NOW)
    assert refusal(checker, SIGNER.sign(claims(jti="r3"))) == "overflow"
    assert refusal(checker, SIGNER.sign(claims(jti="r0"))) == "replayed"
    later = NOW + 36
    for number in range(3):
        checker.verify(SIGNER.sign(claims(jti=f"s{number}", iat=int(later), exp=int(later) + 30)), now=later)
        checker.check_integrity()


def test_without_an_identity_everything_is_refused() -> None:
    token = SIGNER.sign(claims(aud=""))
    assert refusal(GrantVerifier(), token) == "signature"
    assert refusal(GrantVerifier("", SIGNER.public_keys), token) == "audience"


def test_keys_and_identity_change_while_running() -> None:
    checker, new = verifier(), GrantSigner("rotated secret")
    checker.update(public_keys=[*new.public_keys, *SIGNER.public_keys])
    checker.verify(new.sign(claims(jti="n")), now=NOW)
    checker.verify(SIGNER.sign(claims(jti="o")), now=NOW)
    checker.update(public_keys=new.public_keys)
    assert refusal(checker, SIGNER.sign(claims(jti="p"))) == "signature"
    checker.update(replica_id="replica-2", public_keys=new.public_keys)
    assert refusal(checker, new.sign(claims(jti="q"))) == "audience"


def test_the_registry_reads_back_its_own_grants_only() -> None:
    token = SIGNER.sign(claims())
    assert SIGNER.read(token, leeway_s=5, now=NOW) == claims()
    assert SIGNER.read(token, leeway_s=5, now=NOW) == claims(), "reading is not using: resolve and pull share one grant"
    for bad, now in [(token, NOW + 40), (GrantSigner("x").sign(claims()), NOW), ("a.b.c", NOW), ("", NOW)]:
        with pytest.raises(Forbidden) as caught:
            SIGNER.read(bad, leeway_s=5, now=now)
        assert caught.value.error_code == "grant_refused"


def test_the_key_is_derived_alike_everywhere_and_never_from_nothing() -> None:
    assert GrantSigner("s").public_keys == GrantSigner("s").public_keys != GrantSigner("t").public_keys
    assert signer_for("s") is signer_for("s")
    with pytest.raises(ValueError, match="LORARY_SECRET_KEY"):
        GrantSigner("")
