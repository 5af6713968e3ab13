# Every verb sets up what it needs: a virtual environment in .venv, brought up to date when
# pyproject.toml changes. Another interpreter: make test PYTHON=python3.13 (after make clean, if .venv exists).

PYTHON ?= python3
PYTEST_ARGS ?=
SEEDS ?=
RUNS ?= 4000
MINUTES ?= 10
SEED ?=

OTHER := name another interpreter: make PYTHON=/path/to/python3.12

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test check bench format coverage core-coverage pyright clean sim fuzz soak

help:
	@echo "make demo       a workflow that survives its worker, on one SQLite file"
	@echo "make test       all tests, doc tests included, and core/ at 100 % branch coverage"
	@echo "make check      format, lint, types, layers, tidiness"
	@echo "make bench      how fast it is on this machine"
	@echo "make sim        the engine in simulated worlds full of faults, 300 fresh ones (or SEEDS=A..B)"
	@echo "make fuzz       every decoder against inputs made to break it (RUNS=N for each; Linux on x86-64)"
	@echo "make soak       real processes on a real Kafka, killed and paused for MINUTES=N; every promise is checked"
	@echo "make format     write the format and the safe lint fixes"
	@echo "make coverage   the coverage of the whole package"
	@echo "make pyright    a second opinion on the types (downloads Node.js where there is none)"
	@echo "make clean      remove what the other verbs made"

demo: .venv/.run
	@$(BIN)/streamflow demo

bench: .venv/.run
	@$(BIN)/streamflow bench

# The suite comes last: where it had no Kafka broker, its last line says so.
test: .venv/.dev
	$(BIN)/python tests/core_coverage.py
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Other seeds: make sim SEEDS=1000..1999. Those that find a named mutation are kept (tests/sim/seeds.txt).
sim: .venv/.dev
	$(BIN)/streamflow sim $(if $(SEEDS),--seeds $(SEEDS),--fresh 300)

# Without SEED=N another seed with each commit, so that two runs on one agree. One target alone: tests/fuzz/README.md.
fuzz: .venv/.fuzz
	PYTHONHASHSEED=0 $(BIN)/python tests/fuzz/fuzz.py all -runs=$(RUNS) $(if $(SEED),-seed=$(SEED))

# MINUTES=N in all, start and check included. What a failure says can be had again, mostly: make soak SEED=N.
soak: .venv/.dev
	$(BIN)/python tests/e2e/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

check: .venv/.dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/test_tidy.py tests/test_layers.py

format: .venv/.dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

coverage: .venv/.dev
	$(BIN)/python -m pytest --cov $(PYTEST_ARGS)

core-coverage: .venv/.dev
	$(BIN)/python tests/core_coverage.py

pyright: .venv/.dev
	$(BIN)/python -m pyright

clean:
	rm -rf .venv build dist htmlcov .coverage .coverage.* .fuzz .hypothesis .import_linter_cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find streamflow tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps, so that the demo does not wait for linters.
.venv/.run: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' not found: $(OTHER)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "streamflow needs Python 3.11 or newer, found $$($(PYTHON) -V 2>&1): $(OTHER)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks venv or ensurepip: install them (Debian, Ubuntu: apt-get install python3-venv)," >&2; \
		echo "or $(OTHER)" >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) -V) and streamflow ..." >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/.run
	@echo "Setting up the tools for development ..." >&2
	@$(PIP) --editable '.[dev]'
	@touch $@

# Wheels only: from its source it would need a compiler with libFuzzer. Where there is none, fuzz.py says so.
.venv/.fuzz: .venv/.dev
	@echo "Setting up atheris ..." >&2
	@$(PIP) --only-binary atheris --editable '.[dev,fuzz]'
	@touch $@
