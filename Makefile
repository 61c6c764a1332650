# epsbench: `make reproduce` trains the main suites and writes their leaderboards; `make test` runs the tests.
#
# Needs make and Python 3.11 or newer. Every target first sets up .venv where it is absent or where pyproject.toml or
# constraints.txt changed; otherwise the set-up is one comparison of file times.
#
#   PYTHON=python3.12 make test         another interpreter (takes effect when .venv is made)
#   make reproduce SUITE=suites/smoke.toml

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?=
SUITE ?= suites/core.toml suites/transfer.toml suites/contrastive.toml
TESTS ?= tests
QUICK := $(addprefix tests/,provenance registry dp/test_optimizers.py records/test_store.py report/test_compare.py \
  report/test_export.py)
THREADS ?= 1
PORT ?= 5000

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.epsbench-ready

# One thread per process: the launcher and the tests run several processes side by side.
LIMIT := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS)

# Compiled modules are kept: without them every process spends seconds on compiling what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup reproduce test quick report ui bench lint format clean-venv

help:
	@echo "make reproduce    train $(SUITE):"
	@echo "                  write their leaderboards and print the first rows"
	@echo "make test         run the tests"
	@echo "make quick        run those that take seconds (under a minute), and the contracts of imports"
	@echo "make report       write these leaderboards from the records in results/"
	@echo "make ui           open MLflow on the local store"
	@echo "make bench        time every engine and peer side by side (under 20 minutes)"
	@echo "make lint         ruff, mypy and the contracts of imports"
	@echo "make setup        only make .venv;  make clean-venv removes it"

setup: $(READY)

reproduce: $(READY)
	@for suite in $(SUITE); do $(BIN)/epsbench run $$suite --report --with-private-diagnostics || exit $$?; done

report: $(READY)
	@for suite in $(SUITE); do $(BIN)/epsbench report $$suite --with-private-diagnostics || exit $$?; done

bench: $(READY)
	@$(BIN)/epsbench bench

test: $(READY)
	@$(LIMIT) $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

# One process: the second would spend its time on loading what the first has loaded.
quick: $(READY)
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(LIMIT) $(BIN)/python -m pytest -q -m "not slow" $(QUICK)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ui: $(READY)
	@store="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"; \
	case "$$store" in \
	  http://*|https://*) echo "MLflow runs at $$store" ;; \
	  *) MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri "$$store" --port $(PORT) --workers 1 ;; \
	esac

clean-venv:
	rm -rf $(VENV)

# --- set-up ---------------------------------------------------------------------------------------------------------

# $PYTHON alone where it is given; otherwise the first interpreter on the PATH that is new enough.
$(READY): pyproject.toml constraints.txt
	@set -eu; \
	new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	uv=''; if uv --version >/dev/null 2>&1; then uv=uv; fi; \
	if [ ! -x $(BIN)/python ]; then \
	  python=''; \
	  for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	    if new_enough "$$candidate"; then python="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "epsbench needs Python 3.11 or newer; tried: $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)" >&2; \
	    echo "found: $$( { $(or $(PYTHON),python3) --version || echo none; } 2>&1 | head -n 1)" >&2; \
	    echo "write: make PYTHON=/path/to/python3.11 $(or $(MAKECMDGOALS),setup)" >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  rm -rf $(VENV); \
	  if [ -n "$$uv" ]; then uv venv --quiet --python "$$python" $(VENV); \
	  elif ! "$$python" -m venv $(VENV); then \
	    rm -rf $(VENV); \
	    echo "$$python cannot make a virtual environment: install its venv module (Debian: python3-venv), or uv" >&2; \
	    exit 2; \
	  fi; \
	elif ! new_enough $(BIN)/python; then \
	  echo "$(VENV) holds $$($(BIN)/python --version), and epsbench needs 3.11 or newer: run make clean-venv first" >&2; \
	  exit 2; \
	fi; \
	if [ -z "$$uv" ]; then \
	  [ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; \
	  uv=$(BIN)/uv; \
	fi; \
	echo "installing into $(VENV) (PyTorch is large: minutes the first time)"; \
	"$$uv" pip install --quiet --python $(BIN)/python --constraints constraints.txt --editable '.[dev]'; \
	touch $@
