# The two commands a newcomer types: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check unit docs faults gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a dense ResNet and its multigrid twin on real digits, side by side (some minutes)"
	@echo "make test    everything CI checks: format, lint, types, tests, doctests, README, docs"
	@echo "make check   format, lint and types only (seconds)"
	@echo "make unit    tests and doctests only"
	@echo "make faults  every fault it survives, at the full number of trials (half an hour)"
	@echo "make gpu     what needs a GPU: checks, training, benchmarks; CIFAR10=cifar10.npz for the training"
	@echo "make docs    build the documentation into site/"

# Installed anew when the dependencies change. The versions tried are in docs/install.md.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
	  sys.exit(0 if ok else "mgic needs Python 3.11 to 3.13, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -c 'from mgic.runtime.build import main; main()'
	@touch $@

demo: $(READY)
	$(BIN)/mgic demo

check: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread a worker: small convolutions gain nothing from more, and spinning threads steal from each other.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

# The faults of the table, each tried often; rewrites results/faults.json and docs/faults.md.
faults: $(READY)
	$(BIN)/python benchmarks/faults.py

# Steps that have a record in results/ are skipped; given again until none is open, this does the whole queue.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(if $(CIFAR10),--cifar10 $(CIFAR10))

test: check docs unit

clean:
	rm -rf $(VENV) site build *.egg-info
