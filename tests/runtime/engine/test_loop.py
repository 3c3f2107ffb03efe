"""The step thread: submit, cancel, drop, stop and failure from other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from gpu_runtime.core import AdapterKey, FinishReason, Request, SamplingParams, StepOutput
from gpu_runtime.engine.loop import MAX_FAILURES, EngineFull, EngineLoop, EngineStopped
from tests.runtime.engine.rig import HeldExecutor, Rig

PROMPT = tuple(range(10, 30))
WAIT_S = 20.0


class Client:
    """Collects one request's outputs; `done` once the last has come."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.done: Future[StepOutput] = Future()

    def __call__(self, output: StepOutput) -> None:
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.done.set_result(output)  # raises if a second last output ever comes

    def wait(self) -> StepOutput:
        return self.done.result(timeout=WAIT_S)


@pytest.fixture
def rig(model_dir: Path) -> Rig:
    return Rig.build(model_dir, max_batch_requests=4, max_waiting=8)


@pytest.fixture
def loop(rig: Rig) -> Iterator[EngineLoop]:
    loop = EngineLoop(rig.engine)
    loop.start()
    yield loop
    loop.stop()


def submit(
    loop: EngineLoop, name: str, *, adapter: AdapterKey | None = None, max_tokens: int = 8, prompt: tuple[int, ...] = PROMPT
) -> Client:
    client = Client()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    loop.submit(Request(name, prompt, params, adapter, arrived_s=time.monotonic()), grant=None, sink=client)
    return client


def until(condition: object, *, limit_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_from_many_threads(loop: EngineLoop, rig: Rig, adapters: list[Path]) -> None:
    keys = [None, *(rig.source.add(folder, tenant="t") for folder in adapters)]
    clients: dict[int, Client] = {}

    def send(at: int) -> None:
        clients[at] = submit(loop, f"r{at}", adapter=keys[at % len(keys)])

    threads = [threading.Thread(target=send, args=(at,)) for at in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, client in clients.items():
        assert client.wait().finish_reason is FinishReason.LENGTH
        assert len(client.outputs) == 8
        assert [output.token_id for output in client.outputs] == [output.token_id for output in clients[at % 5].outputs]
    until(lambda: loop.state().num_running == 0)
    rig.engine.check_integrity()


def test_an_idle_loop_sleeps_and_wakes(loop: EngineLoop, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    real = rig.engine.step
    monkeypatch.setattr(rig.engine, "step", lambda: steps.append(1) or real())
    time.sleep(0.2)
    assert len(steps) <= 1
    submit(loop, "r").wait()


def test_a_pull_wakes_the_loop_and_the_wait_is_not_a_spin(model_dir: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    executor = HeldExecutor()
    rig = Rig.build(model_dir, executor=executor)
    steps = []
    real = rig.engine.step
    monkeypatch.setattr(rig.engine, "step", lambda: steps.append(1) or real())
    loop = EngineLoop(rig.engine)
    loop.start()
    client = submit(loop, "r", adapter=rig.source.add(adapters[0], tenant="t"))
    time.sleep(0.5)
    assert len(executor.jobs) == 1
    assert len(steps) < 20
    executor.release()
    assert client.wait().finish_reason is FinishReason.LENGTH
    loop.stop()


def test_cancel(loop: EngineLoop) -> None:
    client = submit(loop, "r", max_tokens=100)
    until(lambda: client.outputs)
    loop.cancel("r")
    loop.cancel("unknown")
    assert client.wait().finish_reason is FinishReason.CANCELLED
    until(lambda: loop.state().num_free_pages + loop.state().num_idle_pages == loop.state().num_pages)


def test_drop_from_outside(loop: EngineLoop, rig: Rig, adapters: list[Path]) -> None:
    key = rig.source.add(adapters[0], tenant="t")
    client = submit(loop, "r", adapter=key, max_tokens=30)
    until(lambda: client.outputs)
    loop.drop(key).result(timeout=WAIT_S)
    assert client.wait().finish_reason is FinishReason.LENGTH
    assert loop.state().residents == ()


def test_refusals_come_at_once(loop: EngineLoop) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        submit(loop, "r", prompt=())
    running = [submit(loop, f"r{at}", max_tokens=200) for at in range(12)]
    with pytest.raises(EngineFull):
        submit(loop, "one-too-many")
    with pytest.raises(ValueError, match="'r0'"):
        submit(loop, "r0")
    loop.stop()
    assert all(client.wait().finish_reason is FinishReason.ERROR for client in running)


def test_stop_drains_then_ends_the_rest(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    loop = EngineLoop(rig.engine)
    early = submit(loop, "early")
    loop.start()
    loop.stop(drain_s=WAIT_S)
    assert early.wait().finish_reason is FinishReason.LENGTH
    assert loop.state().condition == "stopped"
    with pytest.raises(EngineStopped):
        submit(loop, "late")
    loop.stop()


def test_stop_before_start_answers_everyone(model_dir: Path) -> None:
    loop = EngineLoop(Rig.build(model_dir).engine)
    client = submit(loop, "r")
    loop.stop()
    assert client.wait().retryable


def test_a_failed_step_fails_its_requests_and_the_next_ones_run(loop: EngineLoop, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = rig.engine._runner
    monkeypatch.setattr(runner, "run", lambda items: 1 / 0)
    client = submit(loop, "r")
    last = client.wait()
    assert (last.finish_reason, last.retryable) == (FinishReason.ERROR, True)
    monkeypatch.undo()
    assert submit(loop, "s").wait().finish_reason is FinishReason.LENGTH
    assert loop.state().condition == "ready"
    rig.engine.check_integrity()


def test_steps_that_keep_failing_fail_the_loop(loop: EngineLoop, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine._runner, "run", lambda items: 1 / 0)
    for at in range(MAX_FAILURES):
        assert submit(loop, f"r{at}").wait().finish_reason is FinishReason.ERROR
    until(lambda: loop.state().condition == "failed")
    with pytest.raises(EngineStopped, match="failed"):
        submit(loop, "s")


def test_a_sink_that_is_gone_costs_its_own_request(loop: EngineLoop) -> None:
    def gone(output: StepOutput) -> None:
        raise RuntimeError("Event loop is closed")

    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    loop.submit(Request("gone", PROMPT, params, None, arrived_s=0.0), grant=None, sink=gone)
    assert submit(loop, "r").wait().finish_reason is FinishReason.LENGTH
    until(lambda: loop.state().num_running == 0)


def test_a_step_that_fails_loses_nobody(model_dir: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One request's pull fails in the very step whose run breaks: both are answered, each with its own reason."""
    executor = HeldExecutor()
    rig = Rig.build(model_dir, executor=executor)
    key = rig.source.add(adapters[0], tenant="t")
    rig.source._forms.clear()
    loop = EngineLoop(rig.engine)
    monkeypatch.setattr(rig.engine._runner, "run", lambda items: 1 / 0)
    waits = submit(loop, "waits", adapter=key)
    loop.start()
    until(lambda: executor.jobs)
    runs = submit(loop, "runs")
    executor.release()
    assert runs.wait().finish_reason is FinishReason.ERROR
    assert waits.wait().error is not None
    loop.stop()


def test_a_broken_engine_answers_everyone(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("a page is lost")

    rig = Rig.build(model_dir)
    loop = EngineLoop(rig.engine)
    clients = [submit(loop, f"r{at}") for at in range(3)]
    monkeypatch.setattr(rig.engine.scheduler, "schedule", broken)
    monkeypatch.setattr(rig.engine.scheduler, "finish", broken)
    loop.start()
    assert all(client.wait().finish_reason is FinishReason.ERROR for client in clients)
    until(lambda: loop.state().condition == "failed")
    loop.stop()
