"""Celery: one task, which carries a job's id as a hint that the job may be claimed. The table of jobs decides everything else.

So a hint that comes twice, late or never costs at most a look at the table: a claim by lease and fence happens once,
and a worker also polls, seldom, for jobs whose hint was lost. Nothing is kept at the broker that the database lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery, bootsteps, signals
from celery.platforms import EX_OK
from celery.worker import state
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from sqlalchemy.exc import SQLAlchemyError

from registry.config import Settings
from registry.jobs.outbox import Hint
from registry.jobs.repository import TOP_PRIORITY
from registry.tracing import TRACEPARENT
from workers.outbox import BrokerAway, Relay
from workers.shell import LOOK_S, Worker

log = structlog.get_logger(__name__)

TASK = "lorary.run_job"
PUBLISH_RETRY = {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 0.5}


def make_celery(settings: Settings) -> Celery:
    """The Celery application of `settings.broker_url`. Raises ValueError for a broker that is neither Redis nor RabbitMQ."""
    url = settings.broker_url.get_secret_value()
    if not url.startswith(("redis://", "rediss://", "amqp://", "amqps://")):
        raise ValueError(f"LORARY_BROKER_URL begins with {url.split(':', 1)[0]!r}; give a redis:// or an amqp:// URL")
    app = Celery("lorary", broker=url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=_is_redis(url),
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_create_missing_queues=False,
        task_queues=[_queue(name, url) for name in settings.worker_queues.split(",")],
        task_default_queue=f"lorary.{settings.worker_queues.split(',')[0]}",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(url, visibility_timeout_s=settings.broker_visibility_timeout_s),
        visibility_timeout=settings.broker_visibility_timeout_s,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease decides who runs a job
        worker_soft_shutdown_timeout=settings.job_drain_s,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    return app


def _is_redis(url: str) -> bool:
    return url.startswith("redis")


def _queue(name: str, url: str) -> Queue:
    """Durable; RabbitMQ must be told that messages have priorities."""
    arguments = {} if _is_redis(url) else {"x-max-priority": TOP_PRIORITY}
    return Queue(f"lorary.{name}", exchange=Exchange("lorary", type="direct"), routing_key=name, queue_arguments=arguments)


def _transport_options(url: str, *, visibility_timeout_s: float) -> dict[str, Any]:
    if not _is_redis(url):
        return {"confirm_publish": True}
    return {
        "visibility_timeout": visibility_timeout_s,
        "priority_steps": list(range(TOP_PRIORITY + 1)),
        "queue_order_strategy": "priority",
        "socket_connect_timeout": 3.0,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }


def make_publisher(settings: Settings) -> Callable[[Hint], None]:
    """Sends a hint to the broker, and returns when the broker has it. Raises BrokerAway."""
    app = make_celery(settings)
    is_redis = _is_redis(settings.broker_url.get_secret_value())

    def publish(hint: Hint) -> None:
        priority = TOP_PRIORITY - hint.priority if is_redis else hint.priority  # on Redis 0 goes first
        queue = _queue(hint.queue, settings.broker_url.get_secret_value())
        try:
            app.send_task(
                TASK,
                args=[hint.job_id],
                task_id=hint.id,
                queue=queue,
                priority=priority,
                headers={} if hint.traceparent is None else {TRACEPARENT: hint.traceparent},
                retry=True,
                retry_policy=PUBLISH_RETRY,
            )
        except (OperationalError, OSError) as error:
            raise BrokerAway(f"{type(error).__name__}: {error}"[:300]) from error

    return publish


def run_with_broker(settings: Settings, *, worker: Worker, relay: Relay, stop: threading.Event) -> None:
    """Consume hints until SIGTERM; relay and poll beside that. The job in hand is finished or given back."""
    app = make_celery(settings)

    @app.task(name=TASK, ignore_result=True, bind=True)  # type: ignore[untyped-decorator]
    def run_job(task: Any, job_id: str) -> None:
        try:
            worker.run_hinted(job_id, traceparent=(task.request.headers or {}).get(TRACEPARENT))
        except SQLAlchemyError as error:
            log.warning("worker.database_away", error=str(error))  # the poll finds the job when the database is back

    def on_shutdown(**_: Any) -> None:
        stop.set()

    app.steps["consumer"].add(Wakeful)
    signals.worker_shutting_down.connect(on_shutdown, weak=False)
    signals.setup_logging.connect(_keep_our_logging, weak=False)
    beside = [
        threading.Thread(target=relay.run, args=(stop,), name="relay"),
        threading.Thread(target=worker.run, args=(stop,), name="poll"),
        threading.Thread(target=_end_consumer, args=(stop,), name="end"),
    ]
    for thread in beside:
        thread.start()
    try:
        alone = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}  # workers have nothing to tell each other
        app.Worker(pool="threads", concurrency=1, quiet=True, **alone).start()
    finally:
        stop.set()
        for thread in beside:
            thread.join()


def _end_consumer(stop: threading.Event) -> None:
    """A SIGTERM that comes before Celery has its own handler is heard by ours alone: tell the consumer what Celery's would."""
    stop.wait()
    if state.should_stop is None:
        state.should_stop = EX_OK


class Wakeful(bootsteps.StartStopStep):  # type: ignore[misc]
    """Wakes an idle consumer to look whether it must end. On RabbitMQ nothing else would, for ten seconds and more after SIGTERM."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """At every connection: losing one clears the timers."""
        consumer.hub.call_repeatedly(LOOK_S, lambda: None)


def _keep_our_logging(**_: Any) -> None:
    """A receiver is all that Celery wants to see to leave logging alone."""
