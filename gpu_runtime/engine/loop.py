"""The thread that steps the engine: the only one that ever touches it.

Other threads leave commands in an inbox; the loop applies them between steps, steps while there is progress to make, and
sleeps on a condition otherwise. An arrived pull wakes it through the same condition.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from gpu_runtime.core import AdapterKey, FinishReason, Request, StepOutput
from gpu_runtime.engine.engine import Engine
from gpu_runtime.engine.state import Condition, EngineState

log = logging.getLogger(__name__)

OutputSink = Callable[[StepOutput], None]

MAX_FAILURES = 3  # consecutive failed steps after which the loop gives up and reports itself failed
BLOCKED_WAIT_S = 0.05  # while everything waits for pulls: how often deadlines are looked at
STATE_AGE_S = 0.05  # while busy: how old the published state may be, for it lists every adapter of every tier


class EngineStopped(RuntimeError):
    """The loop accepts no more requests: it drains, has stopped or has failed."""


class EngineFull(EngineStopped):
    """As many requests wait as the configuration allows; the next one may be taken a little later."""


class EngineLoop:
    """Owns the step thread of one engine.

    `sink`s are called on that thread, in token order, and must not block (hand over with `call_soon_threadsafe`); the last
    output of a request carries `finish_reason`, and exactly one such output arrives for every accepted request.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: list[Callable[[], None]] = []
        self._sinks: dict[str, OutputSink] = {}
        self._wakeup = threading.Condition()  # its lock is reentrant
        self._woken = False
        self._condition: Condition = "starting"
        self._state = engine.state()
        self._published_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        engine.wake_with(self._wake)

    # ---- any thread ----

    def start(self) -> None:
        """Start stepping. Called once."""
        self._become("ready")
        self._thread.start()

    def submit(self, request: Request, *, grant: str | None, sink: OutputSink) -> None:
        """Queue a request; its pull starts with it.

        Raises ValueError (400) if it could never run, EngineStopped (503) if draining, EngineFull (503) if too many wait.
        """
        self._engine.check_request(request)
        with self._wakeup:
            if self._condition not in ("starting", "ready"):
                raise EngineStopped(f"the engine is {self._condition}")
            if request.request_id in self._sinks:
                raise ValueError(f"request_id is {request.request_id!r}; a request of that id is running")
            if len(self._sinks) >= self._engine.max_requests:
                raise EngineFull(f"{len(self._sinks)} requests are running or waiting, the most this runtime takes")
            self._sinks[request.request_id] = sink
            self._command(lambda: self._add(request, grant))

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds; its sink gets a last output. Unknown or finished ids are ignored."""
        self._command(lambda: self._emit(self._engine.cancel(request_id)))

    def drop(self, key: AdapterKey) -> Future[None]:
        """Forget an adapter everywhere. Done when the last handle is released, its pages zeroed and its files gone."""
        done: Future[None] = Future()
        self._command(lambda: self._engine.drop(key).add_done_callback(lambda _: done.set_result(None)))
        return done

    def state(self) -> EngineState:
        """The state after a step at most STATE_AGE_S ago, exact when idle, with this loop's own condition."""
        return replace(self._state, condition=self._condition)

    def inspect(self) -> Future[dict[str, Any]]:
        """What `Engine.inspect` says after the step under way. Ends with EngineStopped where no step will come."""
        done: Future[dict[str, Any]] = Future()

        def look() -> None:
            if not done.set_running_or_notify_cancel():
                return  # whoever asked has stopped waiting
            try:
                found = self._engine.inspect()
            except Exception as error:  # an edge: a look must not end what it looks at
                log.exception("engine.not_inspected")
                done.set_exception(error)
            else:
                done.set_result(found)

        with self._wakeup:
            if self._condition in ("stopped", "failed"):
                done.set_exception(EngineStopped(f"the engine is {self._condition}"))
            else:
                self._command(look)
        return done

    def stop(self, *, drain_s: float = 0.0) -> None:
        """Accept nothing more, let running requests finish for `drain_s`, cancel the rest, end the thread. Idempotent."""
        with self._wakeup:
            if self._condition in ("starting", "ready"):
                self._condition = "draining"
        deadline = time.monotonic() + drain_s
        while self._thread.is_alive() and self._sinks and time.monotonic() < deadline:
            time.sleep(0.01)
        self._command(lambda: self._become("stopped"))
        if self._thread.ident is None:
            self._finish()  # it never started: this thread answers what is queued
        else:
            self._thread.join()
        self._engine.close()

    # ---- step thread ----

    def _run(self) -> None:
        try:
            self._step_until_told()
        except Exception:  # the loop's outer edge: an engine that cannot even abort is not stepped again
            log.exception("engine.broken")
            self._become("failed")
        self._finish()

    def _step_until_told(self) -> None:
        failures = 0
        while self._take_commands():
            failures = 0 if self._step() else failures + 1
            self._publish()
            if failures >= MAX_FAILURES:
                log.error("engine.failed")
                self._become("failed")

    def _step(self) -> bool:
        try:
            self._emit(self._engine.step())
        except Exception:  # the loop's edge: one bad step must not end the process or leave clients hanging
            log.exception("engine.step_failed")
            self._emit(self._engine.abort_all("the engine failed in a step; see its log", retryable=True))
            return False
        return True

    def _publish(self) -> None:
        now_s = time.monotonic()
        if not self._engine.can_progress or now_s - self._published_s >= STATE_AGE_S:
            self._state, self._published_s = self._engine.state(), now_s

    def _take_commands(self) -> bool:
        """Sleep until there is something to do, then apply what the inbox holds. False when the thread shall end."""
        with self._wakeup:
            while not (self._woken or self._engine.can_progress):
                if not self._wakeup.wait(BLOCKED_WAIT_S if self._engine.has_work else None):
                    break
            self._woken = False
        self._apply_inbox()
        return self._condition not in ("stopped", "failed")

    def _apply_inbox(self) -> None:
        with self._wakeup:
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()

    def _finish(self) -> None:
        """Nothing is accepted any more: whoever is left is answered, by the engine or, should it be broken, without it."""
        reason = f"the engine has {self._condition}"
        try:
            self._apply_inbox()
            self._emit(self._engine.abort_all(reason, retryable=True))
            self._state = self._engine.state()
        except Exception:  # the same edge
            log.exception("engine.broken")
        for request_id in list(self._sinks):
            self._emit([StepOutput(request_id, None, finish_reason=FinishReason.ERROR, error=reason, retryable=True)])

    def _add(self, request: Request, grant: str | None) -> None:
        try:
            self._engine.add_request(request, grant=grant)
        except ValueError as error:
            self._emit([StepOutput(request.request_id, None, finish_reason=FinishReason.ERROR, error=str(error))])

    def _emit(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if output.finish_reason is not None:
                self._sinks.pop(output.request_id, None)
            if sink is not None:
                self._deliver(sink, output)

    def _deliver(self, sink: OutputSink, output: StepOutput) -> None:
        try:
            sink(output)
        except Exception:  # also an edge: a sink whose event loop is closed, or which is broken, costs its own request alone
            log.exception("sink.failed", extra={"request_id": output.request_id})
            self._command(lambda: self._emit(self._engine.cancel(output.request_id)))

    def _become(self, condition: Condition) -> None:
        with self._wakeup:
            self._condition = condition

    # ---- both ----

    def _command(self, command: Callable[[], None]) -> None:
        with self._wakeup:
            self._inbox.append(command)
            self._woken = True
            self._wakeup.notify()

    def _wake(self) -> None:
        with self._wakeup:
            self._woken = True
            self._wakeup.notify()
