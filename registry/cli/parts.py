"""A large file to the registry, in parts: several at once, each tried again, and gone on with after an interruption.

The registry knows which parts have arrived, so nothing is remembered here: pushing the same file again goes on.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from registry.cli.client import Json, Overloaded, PartFailed, path
from registry.cli.failure import CliFailure
from registry.cli.jobs import poll
from registry.cli.output import Advance
from registry.cli.remote import Call

PARTS_AT_ONCE = 4
MAX_TRIES = 6
MAX_PAUSE_S = 8.0
FINALISE_TIMEOUT_S = 3600.0


def upload_parts(call: Call, source: Path, *, sha256: str, size: int, advance: Advance) -> None:
    """Send what the registry lacks of `source`, and wait until it has hashed the whole. Raises CliFailure."""
    upload = call.client.post(path("uploads"), {"sha256": sha256, "size": size})
    arrived = {part["number"] for part in upload["parts"] if part["size"] == _size(upload, part["number"])}
    advance(sum(_size(upload, number) for number in arrived))
    missing = [number for number in range(1, upload["num_parts"] + 1) if number not in arrived]
    if upload["state"] == "open":
        _send_all(call, source, upload, missing, advance=advance)
        call.client.post(path("uploads", upload["id"], "complete"), {})
    _wait_until_finalised(call, source, upload)


def _send_all(call: Call, source: Path, upload: Json, numbers: list[int], *, advance: Advance) -> None:
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        sending = [pool.submit(_send, call, source, upload, number, advance=advance) for number in numbers]
        done, waiting = wait(sending, return_when=FIRST_EXCEPTION)
        for part in waiting:
            part.cancel()
        for part in done:
            part.result()


def _send(call: Call, source: Path, upload: Json, number: int, *, advance: Advance) -> None:
    data = _read(source, start=(number - 1) * upload["part_bytes"], size=_size(upload, number))
    for left in reversed(range(MAX_TRIES)):
        try:
            target = call.client.post(path("uploads", upload["id"], "parts"), {"numbers": [number]})["items"][0]
            call.client.put_part(target["url"], data)
        except (PartFailed, Overloaded) as failed:
            if not left:
                raise CliFailure(
                    f"part {number} of {source} did not arrive: {failed}", remedy="push again: it goes on where it stopped"
                ) from failed
            time.sleep(min(MAX_PAUSE_S, 0.5 * 2.0 ** (MAX_TRIES - 1 - left)))
        else:
            advance(len(data))
            return


def _read(source: Path, *, start: int, size: int) -> bytes:
    with source.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise CliFailure(f"{source} became shorter while it was pushed", remedy="push again once nobody writes to it")
    return data


def _size(upload: Json, number: int) -> int:
    return int(min(upload["part_bytes"], upload["size"] - (number - 1) * upload["part_bytes"]))


def _wait_until_finalised(call: Call, source: Path, upload: Json) -> None:
    def look() -> Json | None:
        now = call.client.get(path("uploads", upload["id"]))
        return None if now["state"] == "finalising" else now

    with call.output.waiting(f"checking {source.name}"):
        over = poll(look, timeout_s=FINALISE_TIMEOUT_S, what=f"the check of {source.name}")
    if over["state"] != "done":
        reason = over.get("reason") or {}
        raise CliFailure(
            f"the upload of {source} ended as {over['state']}: {reason.get('detail', 'no reason given')}",
            remedy="push again once nobody writes to it",
            code=reason.get("code"),
        )
