"""The check that ends every fault test sees damage of each kind."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from tests.faults.integrity import check_integrity, settle
from tests.faults.plant import Plant
from tests.registry.adapters.pushing import adapter, sha256
from tests.servers import S3_BUCKET

DAMAGE = {
    "a form is gone": "DELETE FROM forms WHERE tenant_id = :tenant",
    "a version is undecided": "UPDATE adapter_versions SET status = 'pending' WHERE tenant_id = :tenant",
    "a number is skipped": "UPDATE adapter_versions SET number = 7 WHERE tenant_id = :tenant",
    "a blob's row is gone": "DELETE FROM blobs WHERE tenant_id = :tenant",
    "an audit event is missing": "UPDATE adapters SET tenant_id = :other WHERE tenant_id = :tenant",
    "an alias stands elsewhere": "UPDATE aliases SET generation = 5 WHERE tenant_id = :tenant",
    "a job runs for ever": "UPDATE jobs SET state = 'running', lease_expires_at = now() WHERE tenant_id = :tenant",
    "a job ran without a claim": "UPDATE jobs SET fence = 9 WHERE tenant_id = :tenant",
    "an event of a job is gone": "DELETE FROM job_events WHERE tenant_id = :tenant AND number = 2",
    "a delivery failed": "UPDATE webhook_deliveries SET state = 'failed' WHERE tenant_id = :tenant",
}
"""What was wrong -> a statement that makes it so."""


@pytest.mark.full
def test_it_sees_damage(plant: Plant) -> None:
    plant.stop_workers()
    names = [*DAMAGE, "bytes are gone", "bytes are others"]
    tenants = {what: _pushed(plant, f"damaged-{number}") for number, what in enumerate(names)}
    plant.start("worker-1")
    other, _ = plant.make_tenant("another")
    for what, tenant_id in tenants.items():
        settle(plant, tenant_id)
        check_integrity(plant, tenant_id)
        _damage(plant, what, tenant_id=tenant_id, other=other)
        with pytest.raises(Exception) as found:
            check_integrity(plant, tenant_id)
        assert found.type.__name__ in {"AssertionError", "NoSuchKey"}, what


def _pushed(plant: Plant, name: str) -> str:
    tenant_id, token = plant.make_tenant(name)
    with plant.client(token) as http:
        http.post("/webhooks", json={"url": f"{plant.ears.url}/{tenant_id}", "event_types": ["*"]}).raise_for_status()
        files = adapter().files
        for data in files.values():
            http.put(f"/blobs/{sha256(data)}", content=data).raise_for_status()
        http.post("/adapters/pirate/versions", json={"files": {path: sha256(data) for path, data in files.items()}}).raise_for_status()
    return tenant_id


def _damage(plant: Plant, what: str, *, tenant_id: str, other: str) -> None:
    if what in DAMAGE:
        with plant.database.system_write() as session:
            values = {"tenant": tenant_id} | ({"other": other} if ":other" in DAMAGE[what] else {})
            session.execute(text(DAMAGE[what]), values)
        return
    data = adapter().files["adapter_model.safetensors"]
    key = f"{plant.place.prefix}/{tenant_id}/{sha256(data)}"
    if what == "bytes are gone":
        plant.place.server.client.delete_object(Bucket=S3_BUCKET, Key=key)
    else:
        plant.place.server.client.put_object(Bucket=S3_BUCKET, Key=key, Body=data[:-1] + bytes([data[-1] ^ 1]))
