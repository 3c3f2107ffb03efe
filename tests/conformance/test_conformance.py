"""A short conformance run in `make test-full`; `make conformance` is the long one.

schemathesis lives in an environment of its own, which the Makefile makes and names in LORARY_SCHEMATHESIS.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Half the time is coverage, which must have called every operation.
SECONDS = {"neighbour": "30", "limited key": "30", "owner": "45"}


@pytest.mark.full
@pytest.mark.parametrize("caller", list(SECONDS))
def test_every_operation_answers_as_the_document_says(caller: str) -> None:
    schemathesis = os.environ.get("LORARY_SCHEMATHESIS")
    if schemathesis is None:
        pytest.skip("LORARY_SCHEMATHESIS is not set: `make test-full` and `make conformance` set it")
    seed = os.environ.get("LORARY_CONFORMANCE_SEED", "1")
    command = [sys.executable, "-m", "tests.conformance.run", "--schemathesis", schemathesis, "--only", caller]
    done = subprocess.run(
        [*command, "--seconds", SECONDS[caller], "--seed", seed], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
