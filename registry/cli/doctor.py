"""`lorary doctor`: is this installation sound? Looks at the state directory, the database, the bytes and the processes."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from registry.cli.client import ApiProblem, RegistryClient
from registry.cli.credentials import credentials_file, load_key
from registry.cli.failure import CliFailure
from registry.cli.output import Format, Output
from registry.cli.remote import OutputOption, UrlOption, registry_url
from registry.cli.state import read_up
from registry.config import CliSettings, Settings, load_settings

SAMPLE = 200
MIN_FREE_BYTES = 2**30

Status = Literal["ok", "warning", "failed", "skipped"]


class Blobs(StrEnum):
    sample = "sample"
    all = "all"


BlobsOption = Annotated[Blobs, typer.Option("--blobs", help=f"Hash {SAMPLE} recorded blobs at random, or all, and look for orphans too.")]


@dataclass(frozen=True)
class Finding:
    """What one check says. `remedy` only where something is to be done; `items` are what it is about, one by one."""

    check: str
    status: Status
    detail: str
    remedy: str | None = None
    items: tuple[str, ...] = ()


def doctor(blobs: BlobsOption = Blobs.sample, url: UrlOption = None, output: OutputOption = Format.table) -> None:
    """Check this installation. Exit code 1 if any check failed."""
    out = Output(output)
    findings = list(examine(load_settings(), url=url, blobs=blobs, output=out))
    out.rows([asdict(finding) for finding in findings], "check", "status", "detail", "remedy")
    failed = [finding.check for finding in findings if finding.status == "failed"]
    if failed:
        raise CliFailure(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def examine(settings: Settings, *, url: str | None, blobs: Blobs, output: Output) -> Iterator[Finding]:
    """Every check; one that cannot be made is itself a finding, never the end of the others."""
    yield from _guarded("state directory", lambda: _state_dir(settings))
    yield from _guarded("secret key", lambda: _secret_key(settings))
    yield from _guarded("credentials", lambda: _private(credentials_file(settings.state_dir), "credentials", needed=False))
    yield from _guarded("disk space", lambda: _disk(settings))
    yield from _guarded("database schema", lambda: _schema(settings))
    yield from _guarded("blobs", lambda: _blobs(settings, sample=None if blobs is Blobs.all else SAMPLE, output=output))
    yield from _guarded("secrets", lambda: _secrets(settings))
    yield from _guarded("supervisor", lambda: _supervisor(settings))
    yield from _guarded("api", lambda: _api(url))
    yield from _guarded("replicas", lambda: _replicas(url))


def _guarded(check: str, look: Callable[[], Finding | Iterator[Finding]]) -> Iterator[Finding]:
    try:
        found = look()
        yield from [found] if isinstance(found, Finding) else list(found)
    except CliFailure as failure:
        yield Finding(check, "failed", failure.detail, failure.remedy)


def _state_dir(settings: Settings) -> Finding:
    where = settings.state_dir
    if not where.is_dir():
        return Finding("state directory", "failed", f"{where} is absent", "run `lorary db init` or `lorary up`, or set LORARY_STATE_DIR")
    mode = stat.S_IMODE(where.stat().st_mode)
    if mode & 0o022 and any(where.iterdir()):  # an empty one, as an orchestrator mounts it, has nothing to protect
        return Finding("state directory", "failed", f"others may write to {where} (mode {mode:04o})", f"chmod 700 {where}")
    return Finding("state directory", "ok", str(where))


def _secret_key(settings: Settings) -> Finding:
    if settings.secret_key_file.exists():
        return _private(settings.secret_key_file, "secret key", needed=True)
    if settings.secret_key.get_secret_value():
        return Finding("secret key", "ok", "LORARY_SECRET_KEY")
    return Finding("secret key", "failed", "there is none", "run `lorary db init`, or set LORARY_SECRET_KEY")


def _private(file: Path, check: str, *, needed: bool) -> Finding:
    if not file.exists():
        return Finding(check, "failed" if needed else "skipped", f"{file} is absent")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        return Finding(check, "failed", f"others may read {file} (mode {mode:04o})", f"chmod 600 {file}, and replace what it holds")
    return Finding(check, "ok", str(file))


def _disk(settings: Settings) -> Finding:
    if not settings.state_dir.exists():
        return Finding("disk space", "skipped", f"{settings.state_dir} is absent")
    free = shutil.disk_usage(settings.state_dir).free
    detail = f"{free / 2**30:.1f} GiB free"
    return Finding("disk space", "ok", detail) if free >= MIN_FREE_BYTES else Finding("disk space", "failed", detail, "free at least 1 GiB")


def _schema(settings: Settings) -> Finding:
    import migrations  # noqa: PLC0415 - the database stack takes a second to import
    from registry.cli import local  # noqa: PLC0415 - as above

    if not _has_database(settings):
        return Finding("database schema", "failed", "there is no database", "run `lorary db init`")
    revision, head = local.schema_state(settings)
    if migrations.is_newer(revision):
        return Finding("database schema", "warning", f"at {revision}, of a later release than this program, whose head is {head}")
    if revision != head:
        return Finding("database schema", "failed", f"at {revision}, this program needs {head}", "run `lorary db upgrade`")
    return Finding("database schema", "ok", f"at {revision}")


def _has_database(settings: Settings) -> bool:
    """SQLite makes an empty file of a path that is only looked at."""
    return bool(settings.database_url) or (settings.state_dir / "lorary.sqlite3").exists()


def _blobs(settings: Settings, *, sample: int | None, output: Output) -> Iterator[Finding]:
    """Does the store hold what the database promises, byte for byte? And what lies there for nobody?"""
    from registry.cli import local  # noqa: PLC0415 - as above

    if not _has_database(settings):
        yield Finding("blobs", "skipped", "there is no database")
        return
    report = local.check_blobs(settings, sample=sample, output=output)
    hashed = f"{report.checked} of {report.total} hashed"
    if report.wrong:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(report.counts.items()))
        detail = f"{counts}; {hashed}; e.g. {report.wrong[0]}"
        yield Finding("blobs", "failed", detail, "restore them from a backup, or push them again", items=tuple(report.wrong))
    else:
        yield Finding("blobs", "ok", f"{hashed} and equal")
    orphans = f"; {report.orphan_blobs} objects ({report.orphan_bytes} bytes) without a row" if sample is None else ""
    detail = f"{report.unreferenced_blobs} blobs ({report.unreferenced_bytes} bytes) are not referenced{orphans}"
    yield Finding(
        "garbage", "ok", detail, "`lorary gc plan` says what would go" if report.unreferenced_blobs or report.orphan_blobs else None
    )


def _secrets(settings: Settings) -> Finding:
    """Does a secret key that this installation still has open every stored secret?"""
    from registry.cli import local  # noqa: PLC0415 - as above

    if not _has_database(settings) or not settings.secret_key.get_secret_value():
        return Finding("secrets", "skipped", "there is no database or no secret key")
    report = local.check_secrets(settings)
    if report.unreadable:
        return Finding(
            "secrets",
            "failed",
            f"{len(report.unreadable)} of {report.total} cannot be decrypted, e.g. {report.unreadable[0]}",
            "name the key that sealed them in LORARY_SECRET_KEY_PREVIOUS, or set them again",
        )
    if report.num_old:
        detail = f"{report.num_old} of {report.total} are sealed under a previous key"
        return Finding("secrets", "warning", detail, "run `lorary db reseal`")
    return Finding("secrets", "ok", f"{report.total} can be decrypted")


def _supervisor(settings: Settings) -> Finding:
    state = read_up(settings.state_dir)
    if state is None:
        return Finding("supervisor", "skipped", "`lorary up` does not run on this state directory")
    down = [child.name for child in state.children if child.pid is None]
    if down:
        return Finding("supervisor", "failed", f"pid {state.pid}; down: {', '.join(down)}", "see its log")
    restarts = sum(child.num_restarts for child in state.children)
    parts = ", ".join(f"{child.name} {child.pid}" for child in state.children)
    return Finding("supervisor", "warning" if restarts else "ok", f"pid {state.pid}; {parts}; {restarts} restarts")


def _api(url: str | None) -> Finding:
    where = registry_url(url, settings=CliSettings())
    with RegistryClient(where) as client:
        status, body = client.probe("/readyz")
    if status != 200:
        return Finding("api", "failed", f"{where} is not ready: {body.get('checks', status)}", "see its log")
    return Finding("api", "ok", where)


def _replicas(url: str | None) -> Finding:
    settings = CliSettings()
    where = registry_url(url, settings=settings)
    key = settings.api_key.get_secret_value() or load_key(settings.state_dir, where)
    if not key:
        return Finding("replicas", "skipped", "no API key", "`lorary keys login` with an admin key")
    with RegistryClient(where, token=key) as client:
        try:
            live = [replica for replica in client.pages("/replicas") if replica["live"]]
        except ApiProblem as problem:
            if problem.status == 403:
                return Finding("replicas", "skipped", "this key is not an admin's")
            raise
    if not live:
        return Finding("replicas", "warning", "none is live: nothing answers chats", "`lorary up`, or start a runtime")
    return Finding("replicas", "ok", "; ".join(f"{replica['base_model']} at {replica['url']}" for replica in live))
