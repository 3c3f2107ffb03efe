"""`lorary hub`: adapters from the Hugging Face Hub, or from another Lorary."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import Json
from registry.cli.failure import CliFailure
from registry.cli.jobs import DEFAULT_TIMEOUT_S, TimeoutOption, wait_for_job
from registry.cli.push import fail_if_rejected, wait_until_settled
from registry.cli.remote import Call, remote

noun = typer.Typer(help="The Hugging Face Hub, and what speaks like it.", no_args_is_help=True)

RepoArgument = Annotated[str, typer.Argument(help="namespace/name on the hub.")]
RevisionOption = Annotated[str, typer.Option("--revision", help="Branch, tag or commit; of a Lorary also a version number or an alias.")]
NameOption = Annotated[str | None, typer.Option("--name", help="The adapter to push to. Else the repository's own name.")]
BaseModelOption = Annotated[str | None, typer.Option("--base-model", help="Where the adapter's config does not name one of ours.")]
EndpointOption = Annotated[str | None, typer.Option("--endpoint", help="Another hub, one of those that the operator lists.")]
TokenOption = Annotated[str | None, typer.Option("--token-secret", help="The tenant's secret that holds a token for the hub.")]
WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the version is ready or refused.")]


@remote(noun, "import")
def import_adapter(
    call: Call,
    *,
    repo: RepoArgument,
    revision: RevisionOption = "main",
    name: NameOption = None,
    base_model: BaseModelOption = None,
    endpoint: EndpointOption = None,
    token_secret: TokenOption = None,
    wait: WaitOption = True,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Copy one revision of a PEFT adapter from a hub and push it."""
    options = {"name": name, "base_model": base_model, "endpoint": endpoint, "token_secret": token_secret}
    asked = {"repo": repo, "revision": revision} | {option: value for option, value in options.items() if value is not None}
    accepted = call.client.post("/imports", asked)
    if not wait:
        call.output.item(accepted)
        return
    result = _result(call, accepted, timeout_s=timeout_s)
    version = wait_until_settled(call, result["adapter"], result["number"], timeout_s=timeout_s)
    call.output.item(version)
    fail_if_rejected(result["adapter"], version)


def _result(call: Call, accepted: Json, *, timeout_s: float) -> Json:
    """What the job made. Raises CliFailure where it made nothing."""
    job = wait_for_job(call.client, accepted["job_id"], timeout_s=timeout_s, tell=call.output.note)
    result: Json = job.get("result") or {}
    if job["state"] != "succeeded":
        raise CliFailure(f"job {job['id']} {job['state']}", error=(job.get("error") or {}).get("detail"))
    if result["outcome"] != "imported":
        raise CliFailure(f"{accepted['repo']} was not imported: {result['detail']}", code=result["code"])
    return result
