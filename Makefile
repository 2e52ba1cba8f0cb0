# Every target sets up the virtual environment itself on first use, and does nothing later.

VENV   := .venv
PYTHON := $(VENV)/bin/python
CARNICE := $(VENV)/bin/carnice
PIP    := $(PYTHON) -m pip install --quiet --disable-pip-version-check
BROWSER := tests/browser/node_modules/.package-lock.json
FLAGS  ?=

.DEFAULT_GOAL := help
.PHONY: help build all plan verify report list test lint bench clean

ifdef variant
.DEFAULT_GOAL := build
endif

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 10
	@echo 'make variant=NAME builds one variant; FLAGS="..." passes more to carnice'

$(VENV)/core: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# torch comes first, by itself: its CPU build satisfies every later requirement.
$(VENV)/dev: $(VENV)/core
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	touch $@

build: $(VENV)/core ## Build variant=NAME into build/NAME
	@extras=$$($(CARNICE) extras $(variant)) && \
	  if [ -n "$$extras" ]; then $(PIP) --editable ".[$$extras]"; fi
	$(CARNICE) build $(variant) $(FLAGS)

all: $(VENV)/core ## Build every variant
	@extras=$$($(CARNICE) extras $$($(CARNICE) names)) && \
	  if [ -n "$$extras" ]; then $(PIP) --editable ".[$$extras]"; fi
	$(CARNICE) build $$($(CARNICE) names) $(FLAGS)

plan: $(VENV)/core ## Show what building variant=NAME would do
	$(CARNICE) plan $(variant) $(FLAGS)

verify: $(VENV)/core ## Check what was built as variant=NAME
	$(PIP) --editable '.[mlx,torch]'
	$(CARNICE) verify $(variant) $(FLAGS)

report: $(VENV)/core ## Put all that was built side by side in build/report
	$(PIP) --editable '.[report]'
	$(CARNICE) report $(FLAGS)

list: $(VENV)/core ## Show the variants
	@$(CARNICE) list $(FLAGS)

lint: $(VENV)/dev ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# A Chromium for the tests of the report's page; without one they are skipped.
$(BROWSER): tests/browser/package-lock.json
	npm ci --prefix tests/browser --silent --no-audit --no-fund || echo 'there is no browser'

test: lint $(BROWSER) ## Check style and types, and run all tests
	$(VENV)/bin/pytest -n auto --dist loadfile

bench: $(VENV)/dev ## Measure against mlx-lm; needs 20 GB of disk
	$(PYTHON) -m benchmarks.run

clean: ## Remove outputs, cache and environment
	rm -rf build $(VENV) tests/browser/node_modules
	rm -rf $(addprefix cache/,FORMAT records packs partial blobs history builds verified leases lock)
