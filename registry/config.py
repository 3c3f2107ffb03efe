"""Every setting of the registry, read once from `LORARY_*`; nothing changes after start."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

DEFAULT_STATE_DIR = Path.home() / ".lorary"
SECRETS_DIR = "LORARY_SECRETS_DIR"


class EnvironmentSettings(BaseSettings):
    """Read from variables, then from files of the same names (`lorary_secret_key`) in the folder of LORARY_SECRETS_DIR.

    Files are how an orchestrator hands out secrets: they are in no process listing, and no child inherits them.
    Raises ValueError for a folder that is not there.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        folder = os.environ.get(SECRETS_DIR)
        if not folder:
            return init_settings, env_settings
        if not Path(folder).is_dir():
            raise ValueError(f"{SECRETS_DIR} is {folder!r}, which is no directory; mount the secrets there or unset it")
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, secrets_dir=folder)


class S3Settings(EnvironmentSettings):
    """How to reach an S3-compatible store; read where `blob_url` is `s3://bucket/prefix`.

    Without keys here, boto3's own chain finds them: AWS_* variables, a web identity, the instance's role.
    """

    model_config = SettingsConfigDict(env_prefix="LORARY_S3_", frozen=True, extra="ignore")

    endpoint_url: str = Field(default="", description="Empty: Amazon's own, by region.")
    public_endpoint_url: str = Field(default="", description="The same store as clients reach it, for presigned URLs. Empty: endpoint_url.")
    region: str = "us-east-1"
    access_key_id: str = ""
    secret_access_key: SecretStr = SecretStr("")
    addressing_style: str = Field(default="path", pattern="^(path|virtual|auto)$")
    encryption: str = Field(default="", pattern="^(|AES256|aws:kms)$", description="Server-side encryption of every object.")
    kms_key_id: str = ""
    direct_uploads: bool = Field(default=True, description="Parts of large uploads go straight to the store; off: through the API.")
    max_attempts: int = Field(default=3, ge=1)
    connect_timeout_s: float = Field(default=5.0, gt=0)
    read_timeout_s: float = Field(default=60.0, gt=0)
    max_connections: int = Field(default=50, ge=1)


class Settings(EnvironmentSettings):
    """Settings of the registry, its workers and the CLI's local commands.

    Sizes are bytes, durations seconds. `secret_key` signs grants, hashes API keys and encrypts stored secrets; it
    has no default, `lorary db init` writes one into the state directory and `load_settings` reads it from there.
    """

    model_config = SettingsConfigDict(env_prefix="LORARY_", frozen=True, extra="ignore")

    state_dir: Path = DEFAULT_STATE_DIR
    database_url: str = Field(default="", repr=False, description="Of the application's role on PostgreSQL; SQLite in state_dir if empty.")
    database_system_url: str = Field(default="", repr=False, description="PostgreSQL: of the role that may cross tenants.")
    database_owner_url: str = Field(default="", repr=False, description="PostgreSQL: of the role that owns the tables, for `lorary db`.")
    secret_key: SecretStr = SecretStr("")
    public_url: str = "http://127.0.0.1:8420"
    host: str = "127.0.0.1"
    port: int = Field(default=8420, ge=0, le=65535)
    api_workers: int = Field(default=1, ge=1, le=256, description="HTTP server processes behind one socket, each with pools of its own.")
    api_threads: int = Field(default=8, ge=1, le=256, description="Requests of each process that are at the database at once.")
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Addresses and CIDR ranges, comma-separated, whose X-Forwarded-For and -Proto are believed."
    )

    database_busy_timeout_s: float = Field(default=5.0, gt=0, description="How long a writer waits before it answers 503.")
    database_pool_size: int = Field(default=20, ge=1, description="PostgreSQL: connections kept, of each role in each process.")
    database_pool_overflow: int = Field(default=10, ge=0, description="PostgreSQL: connections beyond them under load.")
    database_pool_timeout_s: float = Field(default=5.0, gt=0, description="How long a request waits for a connection before 503.")
    database_pool_recycle_s: float = Field(default=1800.0, gt=0, description="PostgreSQL: age at which a connection is replaced.")
    database_connect_timeout_s: float = Field(default=5.0, ge=2, description="PostgreSQL: how long connecting may take.")
    database_lock_timeout_s: float = Field(default=5.0, gt=0, description="PostgreSQL: how long a statement waits for a lock before 503.")
    database_statement_timeout_s: float = Field(default=30.0, gt=0, description="PostgreSQL: how long one statement may run.")
    database_prepared_statements: bool = Field(
        default=False, description="PostgreSQL: prepare on the server what comes often. Not behind a pooler that cannot take it."
    )
    drain_delay_s: float = Field(default=0.0, ge=0, description="How long after SIGTERM, not ready by then, new requests are still taken.")
    drain_s: float = Field(default=30.0, ge=0, description="How long running requests may take after that.")
    metrics_host: str = Field(default="127.0.0.1", description="Where /metrics listens; whoever reaches it may read.")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Port of /metrics, and of a worker's /livez and /readyz; 0: none.")

    blob_url: str = Field(default="", pattern="^(|s3://.+)$", description="s3://bucket/prefix; empty: a directory of the state directory.")
    s3: S3Settings = Field(default_factory=S3Settings)
    blob_redirect: bool = Field(default=False, description="Answer downloads with 307 to a presigned URL where the store gives one.")
    presigned_ttl_s: int = Field(default=900, ge=1, le=7 * 86400)
    max_upload_bytes: int = Field(default=20 * 2**30, gt=0, description="Limit of one blob that is uploaded in parts.")
    upload_part_bytes: int = Field(default=16 * 2**20, ge=2**10, description="S3 asks for at least 5 MiB.")
    upload_ttl_s: float = Field(default=86400.0, gt=0, description="How long an upload in parts may take.")
    max_open_uploads: int = Field(default=100, ge=1, description="Uploads in parts that a tenant may have open at once.")
    max_inline_blob_bytes: int = Field(default=64 * 2**20, gt=0)
    max_body_bytes: int = Field(default=4 * 2**20, gt=0)
    max_adapter_rank: int = Field(default=128, ge=1)

    hub_endpoints: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Hubs beside the Hugging Face Hub that imports may name, comma-separated: https://hub.example"
    )
    max_import_bytes: int = Field(default=2 * 2**30, gt=0, description="Limit of the weights that an import copies.")
    max_base_model_bytes: int = Field(default=512 * 2**30, gt=0, description="Limit of a base model that is downloaded from a hub.")
    import_timeout_s: float = Field(default=3600.0, gt=0, description="How long the copy of one file may take.")

    replica_ttl_s: float = Field(default=15.0, gt=0)
    heartbeat_interval_s: float = Field(default=2.0, gt=0)
    grant_ttl_s: float = Field(default=30.0, gt=0)
    grant_leeway_s: float = Field(default=30.0, ge=0)
    replica_wait_s: float = Field(default=5.0, ge=0, description="How long a request waits for a live replica before it is answered 503.")
    max_request_tokens: int = Field(default=8192, ge=1, description="Upper limit on max_tokens, written into every grant.")

    job_lease_s: float = Field(default=60.0, gt=0)
    job_poll_s: float = Field(default=0.5, gt=0)
    job_max_attempts: int = Field(default=5, ge=1)
    job_drain_s: float = Field(default=15.0, ge=0, description="How long a worker finishes its job after SIGTERM before it gives it back.")
    max_running_jobs_per_tenant: int = Field(default=8, ge=0, description="Jobs of one tenant that run at the same time; 0: any number.")
    quota_bytes: int | None = Field(default=None, ge=0, description="Bytes of a tenant whose quota says nothing; unset: any number.")
    quota_adapters: int | None = Field(default=None, ge=0, description="Likewise, adapters.")
    quota_versions_per_day: int | None = Field(default=None, ge=0, description="Likewise, versions made in a day of UTC.")
    quota_requests_per_minute: int | None = Field(default=None, ge=0, description="Likewise, inference requests.")
    quota_tokens_per_minute: int | None = Field(default=None, ge=0, description="Likewise, prompt and completion tokens.")
    usage_settle_s: float = Field(default=86_400.0, gt=0, description="How long after its grant a replica may report a request.")
    worker_queues: str = Field(default="cpu,gpu", pattern=r"^[a-z0-9_.-]+(,[a-z0-9_.-]+)*$", description="Queues that a worker serves.")

    broker_url: SecretStr = Field(default=SecretStr(""), description="redis:// or amqp:// of the broker of job hints; none: workers poll.")
    broker_poll_s: float = Field(default=5.0, gt=0, description="How often a worker with a broker looks for jobs whose hint was lost.")
    broker_visibility_timeout_s: float = Field(default=43200.0, gt=0, description="Redis: redelivery of a hint that was not acknowledged.")

    job_events_poll_s: float = Field(default=0.5, gt=0, description="How often a registry process looks for news of watched jobs.")
    max_job_watchers: int = Field(default=2000, ge=1, description="Event streams of jobs in one registry process.")

    secret_key_previous: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="Secret keys before this one, comma-separated: what they sealed and hashed is still good."
    )

    key_rotation_overlap_s: int = Field(default=86_400, ge=0, description="How long a rotated API key works beside its successor.")
    max_key_rotation_overlap_s: int = Field(default=30 * 86_400, ge=0)

    outbound_allow_http: bool = Field(default=False, description="Let tenants' URLs be http://, not https:// alone.")
    outbound_allow_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Hosts, addresses and CIDR ranges, comma-separated, that tenants' URLs may reach though they are not public.",
    )

    webhook_max_attempts: int = Field(default=8, ge=1, description="Attempts at one delivery: over about 18 hours.")
    webhook_first_retry_s: float = Field(default=5.0, gt=0, description="Pause after the first attempt; each is five times the one before.")
    webhook_poll_s: float = Field(default=1.0, gt=0)
    webhook_retention_s: float = Field(default=30 * 86_400.0, gt=0, description="How long ended deliveries stay in the log.")

    deleted_retention_s: float = Field(
        default=30 * 86_400.0, ge=0, description="How long what was deleted can be restored before it is purged; 0: for ever."
    )
    gc_every_s: float = Field(default=3600.0, ge=0, description="How often workers collect garbage by themselves; 0: never.")
    gc_grace_s: float = Field(default=2 * 86_400.0, gt=0, description="How long bytes that nobody references are left alone.")
    gc_rate: float = Field(default=200.0, ge=0, description="Blobs that the GC removes a second at most; 0: as fast as it can.")
    gc_slice_s: float = Field(default=20.0, gt=0, description="How long the GC works before it lets other jobs go first.")
    job_retention_s: float = Field(default=90 * 86_400.0, ge=0, description="How long ended jobs and uploads stay listed; 0: for ever.")

    log_format: str = Field(default="json", pattern="^(json|console)$")
    log_level: str = "INFO"

    @field_validator("outbound_allow_hosts", "secret_key_previous", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for part in value:
            ipaddress.ip_network(part)  # raises ValueError that names it
        return value

    @field_validator("hub_endpoints", mode="before")
    @classmethod
    def _split_endpoints(cls, value: object) -> object:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(part.strip().rstrip("/") for part in parts if part.strip()) if isinstance(parts, list | tuple) else value

    @model_validator(mode="after")
    def _grace_outlasts_uploads_and_grants(self) -> Self:
        longest = max(self.upload_ttl_s, self.gc_hold_s)
        if self.gc_grace_s < longest:
            raise ValueError(
                f"LORARY_GC_GRACE_S is {self.gc_grace_s:g} and an upload, a grant or a download URL may live {longest:g} s; "
                f"give it at least {longest:g}, or shorten LORARY_UPLOAD_TTL_S, LORARY_GRANT_TTL_S or LORARY_PRESIGNED_TTL_S"
            )
        return self

    @property
    def gc_hold_s(self) -> float:
        """How long somebody who was let in may still read what was purged: the longest grant or download URL."""
        return max(self.grant_ttl_s + self.grant_leeway_s, float(self.presigned_ttl_s))

    @cached_property
    def resolved_database_url(self) -> str:
        """The given URL, or the embedded SQLite file of the state directory."""
        return self.database_url or f"sqlite:///{self.state_dir / 'lorary.sqlite3'}"

    @property
    def resolved_owner_url(self) -> str:
        """Who makes and changes tables: the given owner, or the one role there is."""
        return self.database_owner_url or self.resolved_database_url

    @property
    def has_broker(self) -> bool:
        return bool(self.broker_url.get_secret_value())

    @property
    def blob_dir(self) -> Path:
        return self.state_dir / "blobs"

    @property
    def model_dir(self) -> Path:
        return self.state_dir / "models"

    @property
    def secret_key_file(self) -> Path:
        return self.state_dir / "secret.key"


def load_settings(**overrides: object) -> Settings:
    """Read the environment once. The secret key may also stand in `<state_dir>/secret.key`."""
    settings = Settings(**overrides)  # type: ignore[arg-type]
    if settings.secret_key.get_secret_value() or not settings.secret_key_file.exists():
        return settings
    key = settings.secret_key_file.read_text().strip()
    return settings.model_copy(update={"secret_key": SecretStr(key)})


class FirstKeys(EnvironmentSettings):
    """Keys that `lorary db init` stores instead of making its own: from `lorary keys generate`, so that nothing has to be printed."""

    model_config = SettingsConfigDict(env_prefix="LORARY_", frozen=True, extra="ignore")

    first_admin_key: SecretStr = Field(default=SecretStr(""), description="Stored where there is no key at all.")
    replica_key: SecretStr = Field(default=SecretStr(""), description="Of scope replica; stored where its id is unknown.")


class CliSettings(EnvironmentSettings):
    """What the `lorary` command takes from the environment. A flag beats it; the state directory's files come after it."""

    model_config = SettingsConfigDict(env_prefix="LORARY_", frozen=True, extra="ignore")

    state_dir: Path = DEFAULT_STATE_DIR
    url: str = ""
    api_key: SecretStr = SecretStr("")
    tenant: str = ""
    signing_key_password: SecretStr = Field(default=SecretStr(""), description="Of the private key that `push --sign` names.")


def child_environment(**overrides: str) -> dict[str, str]:
    """The environment of a process that `lorary` starts: ours, with `overrides` on top."""
    return {**os.environ, **overrides}


def tracing_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's own variables name a collector, and nothing switches it off. Its SDK reads them further."""
    named = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none"
    return bool(named) and not off
