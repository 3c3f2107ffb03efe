"""What a process of the control plane counts, and in which words. Instruments only: who reads them is `metrics_listener.py`.

Label sets are bounded by construction: route templates, our own codes and states, never a path, tenant, adapter or key.
What a stranger could choose becomes `other` (`among`).
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version

from prometheus_client import GC_COLLECTOR, CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

METRICS = CollectorRegistry()
"""Of this process; an application adds what it reads from its own state (`state_metrics.py`)."""
METRICS.register(GC_COLLECTOR)
ProcessCollector(registry=METRICS)

OTHER = "other"
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WORK_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


def among(value: str, known: Collection[str]) -> str:
    """`value` where it is one of `known`, else `other`: a label that strangers cannot multiply."""
    return value if value in known else OTHER


def _counter(name: str, says: str, *labels: str) -> Counter:
    return Counter(name, says, labels, registry=METRICS)


def _histogram(name: str, says: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, says, labels, buckets=buckets, registry=METRICS)


Info("lorary_build", "The program that answers.", registry=METRICS).info({"version": version("lorary")})

# ---- HTTP of the registry ----

http_requests = _counter("lorary_http_requests_total", "Requests answered, by route template.", "method", "route", "status")
http_seconds = _histogram(
    "lorary_http_request_duration_seconds", "From the first byte to the last byte of the answer.", "method", "route", buckets=REQUEST_S
)
http_in_flight = Gauge("lorary_http_requests_in_flight", "Requests being answered, event streams among them.", registry=METRICS)
audit_refusals = _counter("lorary_audit_refusals_total", "Requests of known keys that were refused and recorded.", "status")

# ---- adapters and blobs ----

pushes = _counter("lorary_pushes_total", "Pushes of a version: created, repeated (the same bytes again), or refused.", "outcome")
gate_outcomes = _counter(
    "lorary_gate_outcomes_total",
    "Versions that the gate passed or refused: in the push (config and header) or in the job (weights). `code` says why.",
    "stage",
    "code",
)
blob_bytes = _counter(
    "lorary_blob_bytes_total", "Bytes of blobs that passed through the API: `in` by uploads, `out` by downloads.", "direction"
)

# ---- serving ----

grants = _counter("lorary_grants_total", "Grants signed: one for each replica that a request was offered to.")
authorisation_seconds = _histogram(
    "lorary_authorisation_seconds",
    "What a model's name means to this tenant and which replica answers: the queries of one request.",
    buckets=FAST_S,
)
relays = _counter(
    "lorary_relayed_requests_total",
    "Inference requests by what became of them: relayed, no_replica, replica_failed, client_left, refused.",
    "outcome",
)

# ---- workers ----

jobs_run = _counter(
    "lorary_worker_jobs_total", "Attempts at jobs: finished, failed, retried, cancelled, released or lost.", "kind", "outcome"
)
job_seconds = _histogram("lorary_worker_job_duration_seconds", "Duration of an attempt at a job.", "kind", buckets=WORK_S)
jobs_in_hand = Gauge("lorary_worker_jobs_in_hand", "Jobs that this process is at.", registry=METRICS)
claims = _counter(
    "lorary_worker_claims_total",
    "Claims by how the job was found (poll, hint) and whether there was one (claimed, none).",
    "found_by",
    "result",
)
heartbeats_missed = _counter("lorary_worker_heartbeats_missed_total", "Heartbeats that the database did not take.")
leases_lost = _counter("lorary_worker_leases_lost_total", "Jobs that another worker took over while this one was at them.")
jobs_given_up = _counter("lorary_worker_jobs_given_up_total", "Jobs of lost workers that ended without a result.", "kind")
hints_published = _counter("lorary_relay_hints_published_total", "Job hints that the broker took.")
relay_failures = _counter("lorary_relay_failures_total", "Rounds of the relay that failed, by who was away: broker or database.", "away")
relay_lag_seconds = _histogram(
    "lorary_relay_lag_seconds", "From the moment a hint was due to its publication.", buckets=(*FAST_S, 2.5, 10.0, 60.0)
)
webhook_attempts = _counter("lorary_webhook_attempts_total", "Attempts to deliver a webhook by the delivery's state after it.", "state")
