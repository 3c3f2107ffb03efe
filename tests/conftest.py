"""Suite-wide rules: time budgets by folder (DESIGN 8), the seeded slice of the full suite, the real base model."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports Triton, which reads it then, in parts

from tests.postgresql import postgresql_server
from tests.servers import s3_server

__all__ = ["postgresql_server", "s3_server"]

ROOT = Path(__file__).resolve().parent.parent
MODEL_DIR = Path(os.environ.get("LORARY_TEST_CACHE", ROOT / ".cache")) / "models" / "smollm2-135m-instruct"

# Seconds of tests by folder, which two processes share: the suite takes about half their sum. A folder that passes its budget by
# half fails the run: slow suites grow in silence.
BUDGETS_S = {"artifact": 60, "registry": 480, "workers": 90, "cli": 120, "runtime": 240, "e2e": 180, "architecture": 60}
BUDGETS_S |= {"helm": 60, "faults": 60}
_spent_s: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", type=int, default=0, help="run only this many of the selected tests")
    parser.addoption("--slice-seed", default="0", help="which ones")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = config.getoption("--slice")
    if not count or config.getoption("-m") != "full":
        return
    full = [item for item in items if item.get_closest_marker("full")]
    chosen = set(random.Random(config.getoption("--slice-seed")).sample(full, min(count, len(full))))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("model") is None or (MODEL_DIR / "model.safetensors").exists():
        return
    message = f"the base model is absent at {MODEL_DIR}; `make setup` prepares it"
    if os.environ.get("LORARY_TEST_REQUIRE_MODEL"):
        pytest.fail(message)
    pytest.skip(message)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    parts = Path(report.nodeid.split("::")[0]).parts
    if len(parts) > 1:
        _spent_s[parts[1]] += report.duration


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("-m") != "not full" or hasattr(session.config, "workerinput"):
        return  # pytest-xdist's workers end sessions of their own; the budget is of the whole
    over = {name: spent for name, spent in _spent_s.items() if spent > 1.5 * BUDGETS_S.get(name, 60)}
    for name, spent in over.items():
        session.config.get_terminal_writer().line(f"\nover budget: tests/{name} took {spent:.0f} s, budget {BUDGETS_S.get(name, 60)} s")
    if over and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def base_model_dir() -> Path:
    """SmolLM2-135M-Instruct as fp32 safetensors; mark the test `model`."""
    return MODEL_DIR
