# Every target does the set-up it needs, once: a bare checkout and Python 3.11 are enough.
#
#   make VENV=/some/dir test        keeps the environment elsewhere
#   make VENV= PYTHON=python3 test  uses that interpreter as it is and installs nothing

SHELL := /bin/bash
FIND_PYTHON = for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(FIND_PYTHON))
VENV ?= .venv
# A CPU build of torch brings no Triton; compiling kernels for a GPU that is not there needs it.
TRITON ?= triton==3.6.0
JOBS ?= 2
TESTS ?=
PYTEST_ARGS ?=

# Threads that wait for each other spin shortly and then sleep. The default spins long, which on a machine with anything else
# to do (two test processes, say) makes every parallel loop on the CPU up to fifty times slower, whoever compiled it.
export GOMP_SPINCOUNT ?= 1000

ifeq ($(strip $(VENV)),)
PY := PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu lint format bench bench-cpu clean

help:  ## say what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## create the environment (every other target does so by itself)

ifneq ($(READY),)
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON); this happens once and takes a minute or two."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON) || echo "No Triton: its tests are skipped."
	@touch $@
endif

demo: $(READY)  ## a small random DeepSeek-V3: what is rewritten, parity, time a token, a plot
	$(PY) -m mlacompile.cli demo

test: $(READY)  ## the tests that need no GPU
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not gpu" $(PYTEST_ARGS) $(TESTS)

test-gpu: $(READY)  ## the tests that need a GPU
	$(PY) -m pytest -m gpu $(PYTEST_ARGS) $(TESTS)

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY)  ## whole decode steps on the GPU; writes benchmarks/results/
	$(PY) benchmarks/decode_step.py

bench-cpu: $(READY)  ## the same on the CPU
	$(PY) benchmarks/decode_step.py --device cpu

clean:  ## remove the environment and every cache
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
