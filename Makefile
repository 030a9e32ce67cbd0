# `make help` lists the targets. Everything happens in .venv.
#
# PyTorch goes in first and alone: what follows then finds it installed and brings no CUDA build of its own.
# A machine without a GPU that installs from pypi.org: make demo TORCH="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
PYTEST ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
DEMO ?= quickstart

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench docs schema clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## one whole job on handwritten digits, in the folder quickstart/ (CPU, minutes)
	$(BIN)/vlmtune quickstart $(DEMO)

test: $(VENV)/installed-dev ## every test (PYTEST="-k config" for some)
ifeq ($(PYTEST),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/families tests/export -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/cli tests/distributed tests/training
else
	$(BIN)/python -m pytest $(PYTEST)
endif

check: $(VENV)/installed-dev ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-bench ## the measurements of docs/performance.md
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/internvl.py
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/quick.py
	$(BIN)/python benchmarks/token_merging.py
	$(BIN)/python benchmarks/train.py

schema: $(VENV)/installed ## write the JSON schema of a run's YAML
	$(BIN)/python -m vlmtune.config.schema_file > schema/run.schema.json

docs: $(VENV)/installed ## write docs/configuration.md
	$(BIN)/python -m vlmtune.config.reference > docs/configuration.md

clean: ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist

$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vlmtune needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH) torch
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-bench: $(VENV)/torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed
