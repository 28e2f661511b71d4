PYTHON ?= python3
# For a machine without a GPU: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^ *\(torch[<>=].*\)/\1/p' setup.cfg)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slurm lint bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(INSTALLED)  ## make .venv and install megaroute with its tools for development

# torch first: what depends on it would otherwise choose a build of it.
$(INSTALLED): setup.cfg pyproject.toml
	@echo "setup: installing megaroute and what it needs into $(VENV), some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

demo: setup  ## train a small routed model on this machine, from text to report, in minutes
	@$(BIN)/python tools/demo.py $(ARGS)

test: setup  ## run the tests; ARGS='-k name' for some, ARGS=-mslow for the slow ones
	@$(BIN)/python -m pytest -m "not slow and not gpu and not slurm" $(ARGS)

test-slurm: setup  ## run jobs on a real SLURM cluster on this machine, and break it; skipped where there is none
	@$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## time a routed layer by density beside a dense one; ARGS=--json for a record
	@$(BIN)/python tools/bench.py layer $(ARGS)

clean:  ## remove .venv, caches and build output; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
