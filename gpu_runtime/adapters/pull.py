"""One pull: disk tier or source -> verified form -> page image. Runs in pull threads; of its own it holds counts alone."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace

from gpu_runtime.adapters.disk import DiskCache
from gpu_runtime.adapters.form import BlobBuffer, Form, verify_manifest
from gpu_runtime.adapters.image import AdapterImage, ImageBuilder
from gpu_runtime.adapters.source import AdapterSource, AdapterUnavailable
from gpu_runtime.core import AdapterKey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PullCounts:
    """Since the start. `num_bytes` and `seconds` are of the pulls from the registry that succeeded."""

    num_pulled: int = 0
    num_from_disk: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class Puller:
    """`disk` None: no disk tier. `max_form_bytes`: the largest form worth pulling, checked before any blob is fetched."""

    def __init__(self, source: AdapterSource, *, builder: ImageBuilder, disk: DiskCache | None, max_form_bytes: int) -> None:
        self._source = source
        self._builder = builder
        self._disk = disk
        self._max_form_bytes = max_form_bytes
        self._counts = PullCounts()
        self._counting = threading.Lock()

    @property
    def counts(self) -> PullCounts:
        """Any thread."""
        return self._counts

    def pull(self, key: AdapterKey, *, grant: str | None) -> AdapterImage:
        """Raises AdapterUnavailable with the reason."""
        try:
            return self._builder.build(self._from_disk(key) or self._from_source(key, grant))
        except AdapterUnavailable:
            self._count(num_failed=1)
            raise

    def _count(self, **more: float) -> None:
        with self._counting:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + value for name, value in more.items()})

    def forget(self, key: AdapterKey) -> None:
        """Remove the form from the disk tier."""
        if self._disk is not None:
            self._disk.drop(key)

    def disk_keys(self) -> tuple[AdapterKey, ...]:
        return () if self._disk is None else self._disk.keys()

    def check_integrity(self) -> None:
        if self._disk is not None:
            self._disk.check_integrity()

    def _from_disk(self, key: AdapterKey) -> Form | None:
        form = None if self._disk is None else self._disk.load(key)
        if form is not None:
            self._count(num_from_disk=1)
        return form

    def _from_source(self, key: AdapterKey, grant: str | None) -> Form:
        started = time.monotonic()
        form = self._fetch(key, grant)
        if self._disk is not None:
            self._disk.insert(form)
        took_s = time.monotonic() - started
        self._count(num_pulled=1, num_bytes=form.num_bytes, seconds=took_s)
        pulled = {"tenant": key.tenant, "form_digest": key.form_digest, "num_bytes": form.num_bytes}
        log.info("adapter.pulled", extra={**pulled, "took_s": round(took_s, 4)})
        return form

    def _fetch(self, key: AdapterKey, grant: str | None) -> Form:
        description, version_digest = self._source.describe(key, grant=grant)
        manifest = verify_manifest(key, description)
        if manifest.size_bytes > self._max_form_bytes:
            raise AdapterUnavailable(
                f"form {key.form_digest} has {manifest.size_bytes} bytes; this runtime can hold {self._max_form_bytes}", retryable=False
            )
        blobs = {}
        for name, blob in manifest.blobs.items():
            buffer = BlobBuffer(name, sha256=blob.sha256, size=blob.size)
            self._source.fetch(key, blob.sha256, buffer, grant=grant)
            blobs[name] = buffer.finish()
        return Form(key, version_digest, manifest, blobs)
