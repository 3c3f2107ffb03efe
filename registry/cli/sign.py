"""`lorary adapters push --sign KEYFILE`: the signature that `model_signing sign key` would make, over the files of the push.

The library is an extra (`lorary[signing]`): it brings sigstore along, which signing with a key does not use.
"""

from __future__ import annotations

import getpass
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from registry.artifact.gate import SIGNATURE_FILE
from registry.cli.failure import CliFailure
from registry.cli.output import Output
from registry.config import CliSettings
from registry.errors import Invalid
from registry.signing.bundle import Bundle, PublicKey


def sign(output: Output, directory: Path, files: Sequence[Path], *, key_file: Path) -> Path:
    """Sign `files` of the folder `directory` and answer the signature's path, in that folder.

    A signature of that key over these very bytes is kept: another one would be other bytes, and so another version.
    Raises CliFailure for a key that cannot be read or used, and where the library is not installed.
    """
    password = _password(key_file)
    public = _public_key(key_file, password)
    target = directory / SIGNATURE_FILE
    signed = [file for file in files if file.name != SIGNATURE_FILE]
    if target.is_file() and _is_good(target.read_bytes(), signed, public):
        output.note(f"{target} is this key's signature of these files already")
        return target
    _write(signed, target, key_file=key_file, password=password)
    output.note(f"signed by {public.fingerprint}: {target}")
    return target


def _is_good(data: bytes, files: Sequence[Path], public: PublicKey) -> bool:
    try:
        bundle = Bundle.parse(data)
        bundle.require_files({file.name: _sha256(file) for file in files})
    except Invalid:
        return False
    return bundle.is_by(public)


def _write(files: Sequence[Path], target: Path, *, key_file: Path, password: bytes | None) -> None:
    try:
        from model_signing import hashing, signing  # noqa: PLC0415 - most of a second, and an extra
    except ImportError as error:
        raise CliFailure(f"signing needs the package model-signing ({error})", remedy="pip install 'lorary[signing]'") from error
    how = hashing.Config().use_file_serialization(hashing_algorithm="sha256").set_allow_symlinks(True)
    how.set_ignored_paths(paths=[Path(SIGNATURE_FILE)], ignore_git_paths=False)
    signer = signing.Config().use_elliptic_key_signer(private_key=key_file, password=password).set_hashing_config(how)
    with tempfile.TemporaryDirectory(dir=target.parent.parent, prefix=f".{target.parent.name}.") as folder:
        view, made = Path(folder) / "adapter", Path(folder) / SIGNATURE_FILE
        view.mkdir()  # of the pushed files alone: the library would name all others in the signature, as ignored
        for file in files:
            (view / file.name).symlink_to(file.resolve())
        signer.sign(view, made)
        made.replace(target)


def _public_key(key_file: Path, password: bytes | None) -> PublicKey:
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), password)
    except (ValueError, TypeError) as error:  # TypeError: a password for a key without one, or none where one is needed
        remedy = "give a private key in PEM; the password of an encrypted one goes into LORARY_SIGNING_KEY_PASSWORD"
        raise CliFailure(f"{key_file} cannot be read as a private key: {error}", remedy=remedy) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        remedy = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
        raise CliFailure(f"{key_file} is not an elliptic-curve key", remedy=remedy)
    return PublicKey.of(key.public_key())


def _password(key_file: Path) -> bytes | None:
    if b"ENCRYPTED" not in key_file.read_bytes():
        return None
    given = CliSettings().signing_key_password.get_secret_value()
    if not given and sys.stdin.isatty():
        given = getpass.getpass(f"password of {key_file}: ", stream=sys.stderr)
    return given.encode() or None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
