# `make help` lists what there is. Everything works from a fresh checkout with Python 3.11+ and nothing else prepared.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The newest supported Python by name where python3 itself is too old.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
ARGS ?=
# Processes that share the test files; each starts the servers that its files need, so more than a few cost more than they bring.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found (Debian 12: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked versions into $(VENV) …"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: venv
venv: $(STAMP)  ## Make .venv with the locked versions (done by the others when needed)

.PHONY: run
run: $(STAMP)  ## Run the whole system here: Kafka, PostgreSQL, ClickHouse, a worker and a simulated fleet (ARGS="--for 60")
	@exec $(BIN)/preservarium up $(ARGS)

.PHONY: packages
packages:
	@.ci/packages

.PHONY: lint
lint: $(STAMP)  ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: test
test: packages $(STAMP) lint  ## Lint, then every test, against real services (ARGS="-k sink" for some)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

.PHONY: test-slow
test-slow: packages $(STAMP)  ## The long property and endurance runs
	$(BIN)/python -m pytest --slow -m slow --timeout=3600 $(ARGS)

.PHONY: soak
soak: packages $(STAMP)  ## Faults by the hundred against the whole system, and a check of every reading (ARGS="--minutes 30 --seed 7 --json run.json")
	PYTHONPATH=tests/adversity $(BIN)/python -m soak $(ARGS)

.PHONY: unit
unit: $(STAMP)  ## Only the tests that need no server
	$(BIN)/python -m pytest tests/unit $(ARGS)

.PHONY: bench
bench: $(STAMP)  ## Measure end to end, beside its peers, and print the ratios
	$(BIN)/python -m bench.e2e $(ARGS)

.PHONY: lock
lock: $(STAMP)  ## Resolve the dependencies anew into the lock files (needs uv)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install -q --disable-pip-version-check uv
	@uv=$$(command -v uv || echo $(BIN)/uv); \
	options="--quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11"; \
	$$uv pip compile $$options pyproject.toml --all-extras -o requirements.lock && \
	$$uv pip compile $$options pyproject.toml --extra scripts -c requirements.lock -o requirements-worker.lock && \
	sed -i "1i # Resolved on $$(date -u +%F)." requirements.lock requirements-worker.lock

.PHONY: audit
audit:  ## How old the locked versions are, and whether one has a known fault
	@.ci/audit

.PHONY: clean
clean:  ## Remove what was built and cached; the data in .preservarium stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
