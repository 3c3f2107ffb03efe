"""What one collection has done so far. No tables: a collection is a job, and what it removes is marked in its own row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

INDEX, PURGE, UPLOADS, SWEEP, ORPHANS, ROWS, DONE = "index", "purge", "uploads", "sweep", "orphans", "rows", "done"
STEPS = (INDEX, PURGE, UPLOADS, SWEEP, ORPHANS, ROWS, DONE)


@dataclass(frozen=True, order=True)
class BlobKey:
    """Where the sweep and the listing of the store stand: both go through addresses in order."""

    tenant_id: str
    sha256: str


@dataclass
class Collection:
    """How far a collection is (`step`, `after`) and what it has counted; it goes on from here after any crash.

    `*_blobs` and `*_bytes` count what was removed, in a dry run what would be. An orphan is an object without a row. One of a
    tenant that the database does not know is counted and left alone: it may belong to another installation.
    """

    dry_run: bool = False
    step: str = INDEX
    after: BlobKey | None = None
    versions_indexed: int = 0
    versions_purged: int = 0
    uploads_expired: int = 0
    uploads_discarded: int = 0
    swept_blobs: int = 0
    swept_bytes: int = 0
    orphan_blobs: int = 0
    orphan_bytes: int = 0
    unknown_blobs: int = 0
    unknown_bytes: int = 0
    rows_removed: int = 0

    def go_to(self, step: str) -> None:
        self.step, self.after = step, None

    @property
    def is_over(self) -> bool:
        return self.step == DONE

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"after": None if self.after is None else [self.after.tenant_id, self.after.sha256]}

    def report(self) -> dict[str, Any]:
        """What the job's result shows: the counts alone."""
        return {name: value for name, value in self.to_json().items() if name not in {"step", "after"}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Collection:
        known = {one.name for one in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        after = given.pop("after", None)
        return cls(**given, after=None if after is None else BlobKey(*after))
