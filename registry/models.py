"""Imports every domain's tables, so that `Table.metadata` is complete: for migrations and for tests."""

from __future__ import annotations

import registry.adapters.models
import registry.audit.models
import registry.base_models.models
import registry.blobs.models
import registry.jobs.models
import registry.quotas.models
import registry.secrets.models
import registry.serving.models
import registry.signing.models
import registry.tenants.models
import registry.uploads.models
import registry.usage.models
import registry.webhooks.models  # noqa: F401
from registry.db import Table

metadata = Table.metadata
