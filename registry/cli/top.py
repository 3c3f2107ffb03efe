"""`lorary top`: live replicas at a glance, asked through the registry every few seconds. For operators."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from registry.cli.client import ApiProblem, Json, path
from registry.cli.output import clean
from registry.cli.remote import Call

MIN_INTERVAL_S, RATE_S = 0.5, 1.0
BAR_WIDTH = 32
USES = {
    "kv": ("K", "cyan"),
    "adapter": ("A", "green"),
    "idle_adapter": ("a", "green"),
    "merged": ("M", "magenta"),
    "idle_merged": ("m", "magenta"),
    "prefix": ("P", "yellow"),
    "idle_prefix": ("p", "yellow"),
    "free": (".", "dim"),
}
COLUMNS = ("REPLICA", "MODEL", "TOK/S", "TTFT", "RUN", "WAIT", "POOL/HOST/DISK", "MODE", "POOL")


@dataclass(frozen=True)
class Look:
    """A replica as it reported, and as it answered; `state` None: it did not."""

    replica: Json
    state: Json | None
    at_s: float


def top(
    call: Call,
    *,
    interval_s: Annotated[float, typer.Option("--interval", metavar="SECONDS", min=MIN_INTERVAL_S, help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One look at two moments a second apart, then end.")] = False,
) -> None:
    """Watch replicas: throughput, time to first token, adapters by tier, mode, pool. Needs an admin key."""
    before = look(call)
    if once or call.output.is_json:
        time.sleep(RATE_S)
        lines = [line_of(now, before=before.get(key)) for key, now in look(call).items()]
        call.output.rows(lines, "replica", "model", "tokens_per_s", "ttft_s", "running", "waiting", "adapters", "mode", "used_percent")
        return
    with Live(screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                now = look(call)
                live.update(_screen(now, before=before), refresh=True)
                before = now
        except KeyboardInterrupt:
            return


def look(call: Call) -> dict[str, Look]:
    """Every live replica, asked in turn; one that does not answer is shown so."""
    found = {}
    for replica in call.client.pages("/replicas"):
        if replica["live"]:
            found[str(replica["id"])] = Look(replica, _state(call, str(replica["id"])), time.monotonic())
    return found


def _state(call: Call, replica_id: str) -> Json | None:
    try:
        return call.client.get(path("replicas", replica_id, "state"))
    except ApiProblem as problem:
        if problem.status in (404, 503):
            return None
        raise


def line_of(now: Look, *, before: Look | None) -> Json:
    """The figures of one replica; rates are between `before` and `now`, None where there is no before."""
    line: Json = {"replica": now.replica["id"], "model": now.replica["base_model"], "answers": now.state is not None}
    if now.state is None:
        return line | dict.fromkeys(("tokens_per_s", "ttft_s", "running", "waiting", "adapters", "mode", "used_percent", "pages"))
    state, pages = now.state, now.state["pool"]["pages"]
    earlier = None if before is None else before.state
    return line | {
        "tokens_per_s": _rate(state, earlier, seconds=0.0 if before is None else now.at_s - before.at_s),
        "ttft_s": _first_token_s(state, earlier),
        "running": state["running"]["total"],
        "waiting": state["waiting"]["total"],
        "adapters": state["adapters"],
        "mode": "unmerged" if state["merged"]["adapter"] is None else f"merged {state['merged']['adapter']['form_digest'][:12]}",
        "used_percent": round(100 * (1 - pages.get("free", 0) / state["pool"]["num_pages"]), 1),
        "pages": pages,
    }


def _rate(now: Json, before: Json | None, *, seconds: float) -> float | None:
    """None where the replica has started anew in between."""
    if before is None or seconds <= 0:
        return None
    made = now["counts"]["generated_tokens"] - before["counts"]["generated_tokens"]
    return round(made / seconds, 1) if made >= 0 else None


def _first_token_s(now: Json, before: Json | None) -> float | None:
    """The mean of the requests that had theirs in between, else of all."""
    then = {"requests": 0.0, "seconds": 0.0} if before is None else before["first_token"]
    requests = now["first_token"]["requests"] - then["requests"]
    if requests <= 0:
        then, requests = {"seconds": 0.0}, now["first_token"]["requests"]
    return round((now["first_token"]["seconds"] - then["seconds"]) / requests, 3) if requests else None


def _screen(now: dict[str, Look], *, before: dict[str, Look]) -> Group:
    table = Table(*COLUMNS, box=None, header_style="bold", expand=True)
    for key, one in now.items():
        table.add_row(*_cells(line_of(one, before=before.get(key))))
    return Group(Text("lorary top: Ctrl-C ends it", style="dim"), table if now else Text("no live replica"))


def _cells(line: Json) -> list[Text]:
    name, model = (Text(clean(str(line[key]))) for key in ("replica", "model"))
    if not line["answers"]:
        return [name, model, Text("does not answer", style="red"), *[Text("")] * (len(COLUMNS) - 3)]
    tiers = "/".join(str(line["adapters"][tier]) for tier in ("pool", "host", "disk"))
    figures = [_figure(line["tokens_per_s"]), _figure(line["ttft_s"]), str(line["running"]), str(line["waiting"]), tiers]
    return [name, model, *map(Text, figures), Text(clean(line["mode"])[:24]), _bar(line["pages"])]


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:g}"


def _bar(pages: Json) -> Text:
    """The pool in BAR_WIDTH letters: K is KV, A adapters, M merged weights, P prefixes; small ones are idle."""
    total = sum(pages.values())
    bar = Text()
    for use in sorted(pages, key=lambda use: list(USES).index(use) if use in USES else -1):
        letter, style = USES.get(use, ("?", "red"))
        bar.append(letter * round(BAR_WIDTH * pages[use] / total), style=style)
    return bar
