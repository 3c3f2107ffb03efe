"""Every kind of job that workers can do."""

from __future__ import annotations

from collections.abc import Mapping

from registry.blobs.service import open_blob_store
from registry.config import Settings
from registry.db import Database
from registry.jobs.service import IMPORT_BASE_MODEL, VALIDATE_VERSION
from workers.importing import BaseModelImport
from workers.shell import JobKind
from workers.validate import Validation


def build_kinds(settings: Settings, database: Database) -> Mapping[str, JobKind]:
    store = open_blob_store(settings)
    store.remove_stale_uploads()
    validation = Validation(database, store, max_rank=settings.max_adapter_rank)
    importing = BaseModelImport(settings.model_dir)
    return {
        VALIDATE_VERSION: JobKind(run=validation.run, give_up=validation.give_up),
        IMPORT_BASE_MODEL: JobKind(run=importing.run, give_up=importing.give_up),
    }
