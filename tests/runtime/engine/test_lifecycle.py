"""How requests and adapters come and go: cancel, drop, refusals, failed pulls, queues."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_runtime.adapters.source import AdapterUnavailable, Sink
from gpu_runtime.core import AdapterKey, FinishReason, RequestState
from tests.runtime.engine.rig import HeldExecutor, InlineExecutor, Rig, write_adapter

PROMPT = list(range(10, 40))


def require_empty(rig: Rig, *, with_adapters: bool = False) -> None:
    """Nothing is running or waiting and no page is held but what is idle."""
    state = rig.engine.state()
    idle = rig.engine.residency.reclaimer.num_idle_pages
    assert (state.num_queued, state.num_running) == (0, 0)
    assert state.num_free_pages + idle == state.num_pages
    assert with_adapters or rig.engine.residency.num_idle_pages == 0
    rig.engine.check_integrity()


def test_cancel_while_the_adapter_is_on_its_way(model_dir: Path, adapters: list[Path]) -> None:
    executor = HeldExecutor()
    rig = Rig.build(model_dir, executor=executor)
    rig.add("r", PROMPT, adapter=rig.source.add(adapters[0], tenant="t"))
    assert rig.step() == []
    assert not rig.engine.can_progress
    assert [output.finish_reason for output in rig.engine.cancel("r")] == [FinishReason.CANCELLED]
    require_empty(rig)
    executor.release()
    assert rig.step() == []
    require_empty(rig)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_cancel_waiting_prefilling_and_decoding(model_dir: Path, adapters: list[Path], num_steps: int) -> None:
    rig = Rig.build(model_dir, executor=InlineExecutor(), max_step_tokens=10)
    request = rig.add("r", PROMPT, adapter=rig.source.add(adapters[0], tenant="t"))
    for _ in range(num_steps):
        rig.step()
    assert rig.engine.cancel("r")
    assert request.state is RequestState.FINISHED
    assert request.finish_reason is FinishReason.CANCELLED
    require_empty(rig, with_adapters=True)
    assert rig.engine.cancel("r") == []


def test_cancel_a_preempted_request(model_dir: Path) -> None:
    rig = Rig.build(model_dir, pool_pages=8)
    rig.add("old", PROMPT, max_tokens=60)
    rig.add("young", PROMPT[::-1], max_tokens=60)
    rig.run(until=lambda: rig.engine.scheduler.num_preemptions > 0)
    assert rig.engine.cancel("young")
    rig.run()
    assert len(rig.tokens("old")) == 60
    require_empty(rig)


def test_one_on_its_way_blocks_nobody(model_dir: Path, adapters: list[Path]) -> None:
    executor = HeldExecutor()
    rig = Rig.build(model_dir, executor=executor)
    slow, fast = (rig.source.add(folder, tenant="t") for folder in adapters[:2])
    rig.add("slow", PROMPT, adapter=slow)
    rig.add("base", PROMPT)
    rig.add("fast", PROMPT, adapter=fast)
    executor.jobs.pop(1)()
    rig.run(until=lambda: not rig.engine.can_progress)
    assert len(rig.tokens("base")) == len(rig.tokens("fast")) == 8
    executor.release()
    rig.run()
    assert len(rig.tokens("slow")) == 8


def test_single_flight(model_dir: Path, adapters: list[Path]) -> None:
    executor = HeldExecutor()
    rig = Rig.build(model_dir, executor=executor)
    mine, yours = (rig.source.add(adapters[0], tenant=tenant) for tenant in ("me", "you"))
    for at in range(4):
        rig.add(f"m{at}", PROMPT, adapter=mine)
    assert len(executor.jobs) == 1
    rig.add("y", PROMPT, adapter=yours)
    assert len(executor.jobs) == 2, "identical bytes of another tenant are another adapter"
    executor.release()
    rig.run()
    assert len(executor.jobs) == 0


class FlakySource:
    """Fails as told, then hands over."""

    def __init__(self, source: object, failure: AdapterUnavailable) -> None:
        self.source = source
        self.failure: AdapterUnavailable | None = failure

    def describe(self, key: AdapterKey, *, grant: str | None) -> object:
        if self.failure is not None:
            raise self.failure
        return self.source.describe(key, grant=grant)  # type: ignore[attr-defined]

    def fetch(self, key: AdapterKey, sha256: str, into: Sink, *, grant: str | None) -> None:
        self.source.fetch(key, sha256, into, grant=grant)  # type: ignore[attr-defined]


@pytest.mark.parametrize("retryable", [True, False])
def test_a_failed_pull_fails_its_requests_and_is_tried_again(model_dir: Path, adapters: list[Path], retryable: bool) -> None:
    rig = Rig.build(model_dir)
    key, other = (rig.source.add(folder, tenant="t") for folder in adapters[:2])
    flaky = FlakySource(rig.source, AdapterUnavailable("the registry said no", retryable=retryable))
    rig.engine.residency._puller._source = flaky  # type: ignore[assignment] # the seam that build_engine fills
    rig.add("a", PROMPT, adapter=key)
    rig.add("b", PROMPT, adapter=key)
    rig.add("base", PROMPT)
    rig.run()
    for name in "ab":
        (output,) = rig.outputs[name]
        assert (output.finish_reason, output.error, output.retryable) == (FinishReason.ERROR, "the registry said no", retryable)
    assert len(rig.tokens("base")) == 8
    require_empty(rig)
    flaky.failure = None
    rig.add("again", PROMPT, adapter=key)
    rig.add("other", PROMPT, adapter=other)
    rig.run()
    assert len(rig.tokens("again")) == len(rig.tokens("other")) == 8


def test_a_source_that_breaks_in_its_own_way_costs_one_request(model_dir: Path, adapters: list[Path]) -> None:
    rig = Rig.build(model_dir)
    key = rig.source.add(adapters[0], tenant="t")
    rig.engine.residency._puller._source = object()  # type: ignore[assignment]
    rig.add("a", PROMPT, adapter=key)
    rig.run()
    assert rig.outputs["a"][0].finish_reason is FinishReason.ERROR
    assert "AttributeError" in str(rig.outputs["a"][0].error)


def test_an_adapter_for_another_base_model_is_refused(model_dir: Path, adapters: list[Path]) -> None:
    rig = Rig.build(model_dir)
    rig.source._base_digest = "c" * 64
    rig.add("a", PROMPT, adapter=rig.source.add(adapters[0], tenant="t"))
    rig.run()
    assert "made for base model cccc" in str(rig.outputs["a"][0].error)
    assert not rig.outputs["a"][0].retryable


def test_a_rank_beyond_the_limit_is_refused(model_dir: Path, adapters: list[Path]) -> None:
    rig = Rig.build(model_dir, max_rank=16)
    rig.add("a", PROMPT, adapter=rig.source.add(adapters[2], tenant="t"))
    rig.run()
    assert "rank 33" in str(rig.outputs["a"][0].error)


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "prompt is empty"),
        ([3, 400], {}, "token 400"),
        ([3, -1], {}, "token -1"),
        ([3] * 500, {"max_tokens": 100}, "at most 512"),
        ([3] * 120, {"max_tokens": 60}, "pages of memory"),
    ],
)
def test_what_could_never_run_is_refused_at_once(model_dir: Path, prompt: list[int], params: dict[str, int], says: str) -> None:
    rig = Rig.build(model_dir, pool_pages=8)
    with pytest.raises(ValueError, match=says):
        rig.add("r", prompt, **params)
    require_empty(rig)


def test_an_adapter_that_leaves_no_room_for_the_request_is_refused_when_its_size_is_known(model_dir: Path, tmp_path: Path) -> None:
    rig = Rig.build(model_dir, pool_pages=64)
    key = rig.source.add(write_adapter(tmp_path / "wide", model_dir, rank=64), tenant="t")
    rig.add("r", [3] * 60, adapter=key, max_tokens=40)
    rig.add("base", PROMPT)
    rig.run()
    assert "for the adapter" in str(rig.outputs["r"][0].error)
    assert len(rig.tokens("base")) == 8
    with pytest.raises(ValueError, match="for the adapter"):
        rig.add("again", [3] * 60, adapter=key, max_tokens=40)


def test_an_id_in_use_is_refused(model_dir: Path) -> None:
    rig = Rig.build(model_dir)
    rig.add("r", PROMPT)
    with pytest.raises(ValueError, match="'r'"):
        rig.add("r", PROMPT)
    rig.run()
    rig.add("r", PROMPT)
    rig.run()


def test_a_deadline_passes_in_the_queue(model_dir: Path) -> None:
    rig = Rig.build(model_dir, max_batch_requests=1)
    rig.add("first", PROMPT)
    rig.add("late", PROMPT, deadline_s=0.0)
    rig.run()
    assert len(rig.tokens("first")) == 8
    assert "deadline" in str(rig.outputs["late"][0].error)
    assert rig.outputs["late"][0].retryable


def test_drop_lets_users_finish_then_zeroes_and_pulls_anew(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    rig = Rig.build(model_dir, executor=InlineExecutor(), disk_cache_dir=tmp_path / "disk", poison_freed=False)
    key = rig.source.add(adapters[0], tenant="t")
    rig.add("runs", PROMPT, adapter=key)
    rig.step()
    pages = rig.engine.residency._residents[key].pages
    done = rig.engine.drop(key)
    assert not done.done()
    assert rig.engine.state().residents == ()
    rig.add("new", PROMPT, adapter=key)
    rig.step()
    rig.run(until=done.done)
    assert len(rig.tokens("runs")) == 8
    assert done.done()
    assert not rig.engine.pool.data[[page for page in pages if rig.engine.pool.owner_of(page) is None]].any()
    rig.run()
    assert rig.tokens("new") == rig.tokens("runs")
    rig.close()


def test_drop_fails_who_waits_and_forgets_every_tier(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    executor = HeldExecutor()
    rig = Rig.build(model_dir, executor=executor, disk_cache_dir=tmp_path / "disk")
    key = rig.source.add(adapters[0], tenant="t")
    rig.add("waits", PROMPT, adapter=key)
    done = rig.engine.drop(key)
    (output,) = rig.step()
    assert output.finish_reason is FinishReason.ERROR
    assert "withdrawn" in str(output.error)
    assert output.retryable
    executor.release()  # the pull under way lands unwanted, after it wrote its files
    rig.step()
    assert not done.done()
    executor.release()
    assert done.done()
    assert rig.engine.state().residents == ()
    assert list((tmp_path / "disk").iterdir()) == []
    require_empty(rig)


def test_tiers_are_reported(model_dir: Path, adapters: list[Path], tmp_path: Path) -> None:
    rig = Rig.build(model_dir, num_slots=1, disk_cache_dir=tmp_path / "disk", host_cache_bytes=60_000)
    keys = [rig.source.add(folder, tenant="t") for folder in adapters[:3]]
    for at, key in enumerate(keys):
        rig.add(f"r{at}", PROMPT, adapter=key)
        rig.run()
    tiers = {resident.key: resident.tier for resident in rig.engine.state().residents}
    assert tiers[keys[2]] == "pool"
    assert set(tiers) == set(keys)
    assert tiers[keys[0]] == "disk"
