# `make help` lists what there is. Each target does its own set-up: only Python (3.11 or newer), pip and make are needed.

PYTHON ?= python3
DATA ?= digits
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Whole files side by side: as many as there are cores, at most four (tests/conftest.py).
BESIDE := -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-hosts test-fid test-cuda test-pythons check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## train, sample and evaluate on real data with a real cluster and S3 server; DATA=digits|fashion-mnist|emoji
	@exec $(BIN)/python tools/local/demo.py $(DATA)

test: $(INSTALLED)  ## the tests, with real servers and processes
	@$(PYTEST) $(BESIDE)

test-full: $(INSTALLED)  ## the tests with their whole matrices and long proofs
	@$(PYTEST) $(BESIDE) -m "not hosts and not fid and not cuda"

test-hosts: $(INSTALLED)  ## several hosts on this machine (namespaces: Linux, root, iproute2, sshd, pdsh)
	@$(PYTEST) -m hosts tests/hosts

test-fid: $(INSTALLED) .venv-fid/.installed  ## FID's network against torch-fidelity, which gets an environment of its own (6 GB)
	@$(PYTEST) -m fid tests/evaluation

test-cuda: $(INSTALLED)  ## what only a GPU can show (10 minutes at most); needs neither Ray nor a bucket
	@$(BIN)/python -m pytest -m cuda tests/cuda

test-pythons:  ## the tests under each of Python 3.12 and 3.13 that is found, in an environment of its own
	@for version in 3.12 3.13; do \
		if ! python$$version -c '' 2>/dev/null; then echo "python$$version is not found here: not tested"; continue; fi; \
		$(MAKE) --no-print-directory test PYTHON=python$$version VENV=.venv-$$version || exit 1; \
	done

check: $(INSTALLED)  ## formatter, linter, types, layering
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -q tests/test_layering.py

clean:  ## removes what can be made again: virtual environments, caches, out/demo
	rm -rf .venv .venv-fid .venv-3.* build *.egg-info out/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.py constraints.txt
	@$(call create_environment,$(VENV),--constraint constraints.txt --editable '.[test$(,)dev]')

.venv-fid/.installed: tests/evaluation/requirements-fid.txt
	@$(call create_environment,.venv-fid,--requirement $<)

, := ,

# $(1): folder, $(2): what pip installs. The stamp is written last, so that a set-up that was broken off is done again.
define create_environment
$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; make PYTHON=/path/to/python3.11")'
@echo "installing into $(1) (once; it takes a few minutes and gigabytes)"
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
@$(1)/bin/python -m pip install -qq --disable-pip-version-check $(2)
@touch $@
endef
