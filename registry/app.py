"""Composition root: builds the application out of settings, and nothing else decides what goes where."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from registry import health, tracing
from registry.adapters import endpoints as adapters
from registry.audit import endpoints as audit
from registry.audit.service import record
from registry.base_models import endpoints as base_models
from registry.blobs import endpoints as blobs
from registry.blobs.service import open_blob_store
from registry.config import Settings, load_settings
from registry.db import open_database
from registry.gc import endpoints as gc
from registry.hub import endpoints as hub
from registry.jobs import endpoints as jobs
from registry.jobs.events import JobWatch
from registry.json_body import StrictJson
from registry.middleware import BodyLimit, RequestContext
from registry.openapi import install_openapi
from registry.outbound import make_outbound_client
from registry.problems import install_error_handlers
from registry.quotas import endpoints as quotas
from registry.readiness import make_readiness
from registry.sealing import make_sealer
from registry.secrets import endpoints as secrets
from registry.serving import endpoints as serving
from registry.serving.proxy import make_client
from registry.signing import endpoints as signing
from registry.tenants import endpoints as tenants
from registry.tenants.keys import make_key_hasher
from registry.tenants.last_used import LastUsed
from registry.threads import limit_threads
from registry.uploads import endpoints as uploads
from registry.usage import endpoints as usage
from registry.webhooks import endpoints as webhooks

API_PREFIX = "/api/v1"
OPENAI_PREFIX = "/v1"


def create_app(settings: Settings | None = None) -> FastAPI:
    """The registry's HTTP surface. Raises ValueError when there is no secret key yet (`lorary db init` makes one)."""
    settings = settings or load_settings()
    app = FastAPI(
        title="Lorary registry",
        version=version("lorary"),
        description="Multi-tenant registry of LoRA adapters, and the front door to the replicas that serve them.",
        lifespan=_lifespan,
        telemetry=tracing.APPLICATION,
    )
    _set_state(app, settings)
    _include_routers(app)
    install_error_handlers(app)
    install_openapi(app)
    app.add_middleware(StrictJson)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    if settings.trusted_proxies:  # outermost: everything inside sees the client's address and scheme
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.trusted_proxies))
    return app


def _set_state(app: FastAPI, settings: Settings) -> None:
    app.state.settings = settings
    app.state.key_hasher = make_key_hasher(settings)
    app.state.database = open_database(settings)
    app.state.blob_store = open_blob_store(settings)
    app.state.job_watch = JobWatch(app.state.database, poll_s=settings.job_events_poll_s, max_watchers=settings.max_job_watchers)
    app.state.last_used = LastUsed(app.state.database)
    app.state.record = record
    app.state.sealer = make_sealer(settings)
    app.state.outbound = make_outbound_client(settings)
    app.state.http = make_client()
    app.state.readiness = make_readiness(settings, app.state.database, app.state.blob_store)


def _include_routers(app: FastAPI) -> None:
    """In the order of how often each is asked: a request is held against one route after the other until one takes it."""
    app.include_router(serving.openai_router, prefix=OPENAI_PREFIX)
    operated = (jobs, tenants, audit, secrets, webhooks, quotas, gc, usage)
    for domain in (adapters, serving, blobs, uploads, base_models, signing, *operated):
        app.include_router(domain.router, prefix=API_PREFIX)
    app.include_router(health.router)
    app.include_router(hub.router, prefix=API_PREFIX)
    app.include_router(hub.hub_router)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.last_used.start()
    limit_threads(app.state.settings.api_threads)
    try:
        yield
    finally:
        app.state.last_used.stop()
        await app.state.http.aclose()
        app.state.database.close()
        await run_in_threadpool(tracing.flush_tracing)  # here, because the signal that ends us ends the process right after
