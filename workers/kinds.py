"""Every kind of job that workers can do."""

from __future__ import annotations

from collections.abc import Mapping

from registry.blobs.service import open_blob_store, remove_stale_uploads
from registry.config import Settings
from registry.db import Database
from registry.jobs.service import COLLECT_GARBAGE, FINALISE_UPLOAD, IMPORT_BASE_MODEL, IMPORT_HUB, VALIDATE_VERSION
from workers.collect import GarbageCollection
from workers.finalise import UploadFinaliser
from workers.hub_import import make_hub_import
from workers.hub_model import make_hub_download
from workers.importing import BaseModelImport
from workers.shell import JobKind
from workers.validate import Validation


def build_kinds(settings: Settings, database: Database) -> Mapping[str, JobKind]:
    store = open_blob_store(settings)
    remove_stale_uploads(store, ttl_s=settings.upload_ttl_s)
    validation = Validation(database, store, max_rank=settings.max_adapter_rank)
    importing = BaseModelImport(settings.model_dir, hub=make_hub_download(settings, database))
    hub = make_hub_import(settings, database, store)
    finaliser = UploadFinaliser(database, store)
    collector = GarbageCollection(database, store, settings)
    return {
        COLLECT_GARBAGE: JobKind(run=collector.run, give_up=collector.give_up),
        FINALISE_UPLOAD: JobKind(run=finaliser.run, give_up=finaliser.give_up),
        VALIDATE_VERSION: JobKind(run=validation.run, give_up=validation.give_up),
        IMPORT_BASE_MODEL: JobKind(run=importing.run, give_up=importing.give_up),
        IMPORT_HUB: JobKind(run=hub.run, give_up=hub.give_up),
    }
