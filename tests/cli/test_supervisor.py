"""The supervisor over real processes: small Python programs that live, die, refuse to die, and leave children behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from registry.cli.childlog import ChildLog, plain, wrapped
from registry.cli.failure import CliFailure
from registry.cli.supervisor import Patience, Program, StopAsked, Supervisor
from registry.config import child_environment

SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
QUICK = Patience(first_wait_s=0.05, max_wait_s=0.2, max_crashes=3, stable_s=30)

Told = list[str]


def program(name: str, code: str, **options: object) -> Program:
    return Program(name=name, command=(sys.executable, "-c", code), environment=child_environment(), **options)  # type: ignore[arg-type]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def supervisor(told: Told) -> Iterator[Supervisor]:
    made = Supervisor(log=ChildLog(as_json=False), tell=told.append, patience=QUICK)
    yield made
    for child in made.children:
        child.end()


def wait_for(supervisor: Supervisor, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    supervisor.wait_until(condition, timeout_s=timeout_s, what="the test")


def test_looks_of_the_supervisor_itself_are_not_shown_unless_they_fail(supervisor: Supervisor, capfd: pytest.CaptureFixture[str]) -> None:
    def access(path: str, client_id: str, status: int = 200) -> str:
        return json.dumps({"event": "http.request", "path": path, "status": status, "client_request_id": client_id})

    own = supervisor.poll_id
    lines = [access("/ours", own), access("/failed", own, 503), access("/theirs", "chosen"), f"plain {own}"]
    child = supervisor.add(program("part", f"print({chr(10).join(lines)!r}, flush=True); {SLEEP}"))
    wait_for(supervisor, lambda: any("plain" in line for line in supervisor._log.tail("part")))
    shown = "\n".join(supervisor._log.tail("part"))
    assert "/ours" not in shown
    assert "/failed" in shown
    assert "/theirs" in shown
    child.end()


def test_a_killed_child_is_restarted_with_a_new_pid(supervisor: Supervisor, told: Told) -> None:
    changes: list[int | None] = []
    child = supervisor.add(program("part", SLEEP))
    supervisor.on_change = lambda: changes.append(child.process.pid if child.process else None)
    assert child.process is not None
    first = child.process.pid
    os.kill(first, signal.SIGKILL)
    wait_for(supervisor, lambda: child.num_restarts == 1)
    assert child.process.pid != first
    assert told == ["part ended with signal SIGKILL", "part restarted (restart 1)"]
    assert changes == [None, child.process.pid]


def test_a_child_that_keeps_crashing_is_given_up_with_its_last_words(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> None:
    child = supervisor.add(program("part", "import sys; sys.exit('no such model')"))
    with pytest.raises(CliFailure, match="crashed 3 times in a row") as caught:
        wait_for(supervisor, lambda: False)
    assert child.num_restarts == 2
    assert "no such model" in caught.value.fields["part"]
    assert "part | no such model" in capsys.readouterr().err


def test_a_long_life_forgives_earlier_crashes(told: Told) -> None:
    forgiving = Supervisor(log=ChildLog(as_json=False), tell=told.append, patience=Patience(first_wait_s=0.01, max_crashes=2, stable_s=0.0))
    child = forgiving.add(program("part", "pass"))
    forgiving.wait_until(lambda: child.num_restarts >= 3, timeout_s=20, what="three restarts")
    forgiving.stop()


def test_waiting_grows_up_to_a_cap() -> None:
    assert [QUICK.wait_s(crashes) for crashes in (1, 2, 3, 4, 60)] == [0.05, 0.1, 0.2, 0.2, 0.2]


def test_a_part_that_dies_before_it_is_ready_fails_the_start_at_once(supervisor: Supervisor) -> None:
    child = supervisor.add(program("part", "raise SystemExit('bad flag')"))
    with pytest.raises(CliFailure, match="ended before it was ready") as caught:
        supervisor.wait_until(lambda: False, timeout_s=20, what="part", child=child)
    assert caught.value.fields == {"part": "bad flag"}


def test_a_part_that_never_gets_ready_fails_after_its_time(supervisor: Supervisor) -> None:
    child = supervisor.add(program("part", SLEEP))
    with pytest.raises(CliFailure, match=r"not ready after 0\.3 s"):
        supervisor.wait_until(lambda: False, timeout_s=0.3, what="part", child=child)


def test_stop_goes_by_rank_and_waits_for_each(supervisor: Supervisor, tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n time.sleep(0.2); {note}({name!r}); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    for name, rank in (("a", 0), ("r", 2), ("w", 1)):
        supervisor.add(program(name, code.format(note=note, name=name), rank=rank))
    wait_for(supervisor, lambda: all(supervisor._log.tail(name) for name in "arw"))
    supervisor.stop()
    assert (tmp_path / "order").read_text() == "rwa"


def test_what_ignores_sigterm_is_killed_with_everything_it_started(supervisor: Supervisor, told: Told) -> None:
    grandchild = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); print(p.pid, flush=True); {STUBBORN}"
    child = supervisor.add(program("part", grandchild, stop_timeout_s=0.5))
    wait_for(supervisor, lambda: "deaf" in supervisor._log.tail("part"))
    pids = [child.process.pid, int(supervisor._log.tail("part")[0])] if child.process else []
    supervisor.stop()
    assert told == ["part did not end in time and is killed"]
    for pid in pids:
        assert_gone(pid)


def test_what_a_crashed_child_left_behind_is_killed_before_the_restart(supervisor: Supervisor) -> None:
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); print(p.pid, flush=True)"
    child = supervisor.add(program("part", code))
    wait_for(supervisor, lambda: child.num_crashes == 1)
    assert_gone(int(supervisor._log.tail("part")[0]))


def test_niceness_reaches_the_child_and_not_us(supervisor: Supervisor) -> None:
    ours = os.nice(0)
    supervisor.add(program("part", "import os; print('nice', os.nice(0), flush=True); import time; time.sleep(60)", niceness=5))
    wait_for(supervisor, lambda: bool(supervisor._log.tail("part")))
    assert supervisor._log.tail("part") == [f"nice {min(19, ours + 5)}"]
    assert os.nice(0) == ours


def test_a_signal_stops_the_wait(supervisor: Supervisor) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with supervisor.handling_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopAsked):
            wait_for(supervisor, lambda: False)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_die_with_a_supervisor_that_is_killed() -> None:
    code = f"""
import sys, time
from registry.cli.childlog import ChildLog
from registry.cli.supervisor import Program, Supervisor
from registry.config import child_environment
supervisor = Supervisor(log=ChildLog(as_json=False), tell=print)
child = supervisor.add(Program(name="part", command=(sys.executable, "-c", {STUBBORN!r}), environment=child_environment()))
supervisor.wait_until(lambda: bool(supervisor._log.tail("part")), timeout_s=20, what="part")
print(child.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert_gone(pid)


def assert_gone(pid: int) -> None:
    """Gone, or a zombie that its new parent has yet to reap."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


def test_logs_are_readable_as_text_and_whole_as_json() -> None:
    event = '{"event": "adapter.pulled", "level": "warning", "timestamp": "t", "num_bytes": 3, "tenant": null}'
    assert plain("api", event) == "api | warning adapter.pulled num_bytes=3"
    assert plain("api", "Traceback: boom") == "api | Traceback: boom"
    assert json.loads(wrapped("api", event)) == {"process": "api", **json.loads(event)}
    assert json.loads(wrapped("api", "{not json")) == {"process": "api", "event": "{not json"}
    assert json.loads(wrapped("api", "[" * 100_000))["process"] == "api"
