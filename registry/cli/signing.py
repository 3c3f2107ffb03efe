"""`lorary signing-keys` and `lorary signing-policy`: whose signatures a tenant trusts, and what pushes must show."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from registry.cli.client import path
from registry.cli.remote import Call, YesOption, remote

keys_noun = typer.Typer(help="Signing keys: public keys whose signatures on adapters you trust.", no_args_is_help=True)
policy_noun = typer.Typer(help="Signing policy: what pushes must show.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="The key's name, e.g. release-2026.")]
FileArgument = Annotated[Path, typer.Argument(help="PEM of the public key: `openssl ec -in key.pem -pubout -out key.pub`.")]


class Policy(StrEnum):
    off = "off"
    verify_if_present = "verify_if_present"
    require = "require"


@remote(keys_noun, "add")
def add(call: Call, name: NameArgument, file: FileArgument) -> None:
    """Trust a public key (P-256, P-384 or P-521)."""
    call.output.item(call.client.post("/signing-keys", {"name": name, "public_key": file.read_text(errors="replace")}))


@remote(keys_noun, "list")
def list_keys(call: Call) -> None:
    """List keys, revoked ones too. FINGERPRINT is sha256 of the public key's file."""
    call.output.rows(call.client.list("/signing-keys"), "name", "curve", "fingerprint", "created_at", "revoked_at")


@remote(keys_noun, "revoke")
def revoke(call: Call, name: NameArgument, yes: YesOption = False) -> None:
    """Revoke a key for good. Its signatures are no longer taken; versions that it vouched for show it."""
    call.output.confirm(f"Revoke signing key {name}? It can never be added again.", yes=yes)
    call.client.delete(path("signing-keys", name))
    call.output.note(f"signing key {name} revoked")


@remote(policy_noun, "show")
def show(call: Call) -> None:
    """Show the tenant's policy, and the least that operators ask of it."""
    call.output.item(call.client.get("/signing-policy"))


@remote(policy_noun, "set")
def set_policy(
    call: Call,
    policy: Annotated[Policy, typer.Argument(help="off, verify_if_present (a bad signature is refused) or require (and so is none).")],
    floor: Annotated[bool, typer.Option("--floor", help="With an admin key and --tenant: the least that the tenant may choose.")] = False,
) -> None:
    """Set what pushes must show from now on."""
    call.output.item(call.client.put("/signing-policy", {"floor" if floor else "policy": policy.value}, headers={}))
