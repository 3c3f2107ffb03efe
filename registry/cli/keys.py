"""`lorary keys`: API keys at the registry, and the one that this command itself uses (`login`, `logout`, `whoami`)."""

from __future__ import annotations

import getpass
import re
import sys
from typing import Annotated

import typer

from registry.cli.client import ApiProblem, RegistryClient, path
from registry.cli.credentials import forget_key, store_key
from registry.cli.failure import CliFailure
from registry.cli.output import Output
from registry.cli.remote import Call, YesOption, remote

noun = typer.Typer(help="API keys: who may do what.", no_args_is_help=True)

DURATION = re.compile(r"(\d+)([smhd])")
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

ScopeOption = Annotated[list[str], typer.Option("--scope", "-s", help="Repeat for several, e.g. adapters:write.")]
PrefixOption = Annotated[
    list[str] | None, typer.Option("--adapter-prefix", help="Limit it to adapters whose names begin so. Repeat for several. Default: all.")
]
OverlapOption = Annotated[
    str | None, typer.Option("--overlap", help="How long the old key still works, e.g. 1h; 0 for not at all. Default: the registry's.")
]
ExpiresOption = Annotated[str | None, typer.Option("--expires-in", help="Lifetime, e.g. 12h or 30d. Default: does not expire.")]


@remote(noun, "create")
def create(
    call: Call,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: ScopeOption,
    *,
    adapter_prefix: PrefixOption = None,
    expires_in: ExpiresOption = None,
) -> None:
    """Create a key. Its token is printed now and never again."""
    body: dict[str, object] = {"name": name, "scopes": scope}
    if adapter_prefix:
        body["adapter_prefixes"] = adapter_prefix
    if expires_in is not None:
        body["expires_in_s"] = parse_duration(expires_in)
    call.output.item(call.client.post("/keys", body))
    call.output.note("the token above cannot be shown again: store it now")


@noun.command("generate")
def generate() -> None:
    """Print a well-formed token that no registry knows: for LORARY_FIRST_ADMIN_KEY and LORARY_REPLICA_KEY of `lorary db init`."""
    from registry.tenants.keys import new_key  # noqa: PLC0415 - a request needs none of it

    Output().line(new_key().token)


@remote(noun, "list")
def list_keys(call: Call) -> None:
    """List keys, newest first. Secrets are not stored, so none is shown."""
    columns = ("id", "name", "tenant", "scopes", "adapter_prefixes", "expires_at", "revoked_at", "last_used_at", "created_at")
    call.output.rows(call.client.pages("/keys"), *columns)


@remote(noun, "rotate")
def rotate(
    call: Call,
    key_id: Annotated[str, typer.Argument(help="The key's id.")],
    overlap: OverlapOption = None,
    expires_in: ExpiresOption = None,
) -> None:
    """Make a successor with the same rights. Its token is printed now and never again; the old key stops after the overlap."""
    body: dict[str, object] = {}
    if overlap is not None:
        body["overlap_s"] = 0 if overlap == "0" else parse_duration(overlap, hint="--overlap")
    if expires_in is not None:
        body["expires_in_s"] = parse_duration(expires_in)
    made = call.client.post(f"{path('keys', key_id)}/rotate", body)
    call.output.item(made)
    call.output.note(f"the token above cannot be shown again: store it now; {key_id} works until {made['predecessor_expires_at']}")


@remote(noun, "revoke")
def revoke(call: Call, key_id: Annotated[str, typer.Argument(help="The key's id.")], yes: YesOption = False) -> None:
    """Revoke a key: it stops working at once."""
    call.output.confirm(f"Revoke key {key_id}? Whoever uses it is locked out at once.", yes=yes)
    call.client.delete(path("keys", key_id))
    call.output.note(f"key {key_id} revoked")


@remote(noun, "login")
def login(call: Call) -> None:
    """Read a key from stdin (or a hidden prompt), check it, and keep it for this registry's URL in a 0600 file."""
    key = (getpass.getpass("API key: ", stream=sys.stderr) if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not key:
        raise CliFailure("no key on stdin", remedy="pipe it in: `lorary keys login < key.txt`")
    with RegistryClient(call.client.url, token=key) as client:
        subject = _check(client)
    file = store_key(call.state_dir, call.client.url, key)
    call.output.item(subject)
    call.output.note(f"key stored for {call.client.url} in {file}")


@remote(noun, "logout")
def logout(call: Call) -> None:
    """Forget the stored key of this registry's URL. The key itself stays valid: see `revoke`."""
    known = forget_key(call.state_dir, call.client.url)
    call.output.note(f"{'forgot the' if known else 'there was no'} key for {call.client.url}")


@remote(noun, "whoami")
def whoami(call: Call) -> None:
    """Show the key in use: its tenant and scopes."""
    call.output.item(call.client.get("/whoami"))


def parse_duration(text: str, *, hint: str = "--expires-in") -> int:
    """Seconds of `90s`, `15m`, `12h`, `30d`."""
    match = DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a lifetime; write a whole number and s, m, h or d, e.g. 30d", param_hint=hint)
    return int(match[1]) * UNIT_S[match[2]]


def _check(client: RegistryClient) -> dict[str, object]:
    try:
        return client.get("/whoami")
    except ApiProblem as problem:
        if problem.status == 401:
            raise CliFailure(
                "the registry does not accept this key; nothing was stored", remedy="check that it was copied whole"
            ) from problem
        raise
