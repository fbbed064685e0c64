# Everything runs in .venv, which is made on first use. Another interpreter: make PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := dev,distill,docs,examples,metrics,solvers,tracking,triton
PIP_INSTALL := -m pip --disable-pip-version-check -qq install
PIP := $(BIN)/python $(PIP_INSTALL) -c constraints.txt

# An environment of its own for the newest PyTorch, with the frameworks in which the heads are used.
NEWEST := .venv-integrations

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-all slow numerical integrations bench dist lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## train the heads side by side on a small problem
	@$(BIN)/python examples/train_heads.py --demo

# In parallel, one process a core and one thread a process: the tensors of a test are small. What is compiled is
# kept here: a file that a killed process of somebody else left half written would fail a test.
# A folder for each instruction set: Inductor of PyTorch 2.13 computes garbage with what it compiled for another.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.pytest_cache/inductor$(addprefix -,$(ATEN_CPU_CAPABILITY))
# A test that stands still for a quarter of an hour fails, with the stacks of its threads, and the others go on.
IN_PARALLEL := -q -n auto --maxprocesses 8 --dist worksteal \
	-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PARALLEL)

test: lint  ## lint, then tests and doctests: under five minutes on two cores
	@echo "==> tests and doctests"
	@$(PYTEST)

test-all: test slow  ## everything: also the tests that take minutes

slow: $(INSTALLED)  ## the tests that take minutes
	@echo "==> the tests that take minutes"
	@$(PYTEST) -m slow

# Where numbers are computed, so that other instruction sets round otherwise: `make numerical ATEN_CPU_CAPABILITY=avx2`.
# Not Inductor without vector instructions: it writes code for the registers that this setting takes away from it.
numerical: $(INSTALLED)  ## only the tests of what computes
	@echo "==> the numerical tests"
	@$(PYTEST) $(addprefix tests/,linalg geometry codes functional solvers adjoints nn metrics ood) \
	  $(if $(filter default,$(ATEN_CPU_CAPABILITY)),-k "not inductor")

integrations: $(NEWEST)/.installed  ## the library in the newest PyTorch and in other frameworks (6 GB, 15 minutes)
	@echo "==> the library's tests and other frameworks' models on the newest PyTorch"
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest $(IN_PARALLEL) --ignore tests/benchmarks --ignore tests/examples

bench: $(INSTALLED)  ## measure time and memory
	@$(BIN)/python -m benchmarks

# Material announces its successor on every run.
docs: $(INSTALLED)  ## the documentation as a site that needs no network: build/site/index.html
	@echo "==> mkdocs: the site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

# The same files come out of the same sources, so what the tests build and what is built here are alike.
dist: $(INSTALLED)  ## build the wheel and the source distribution, and test what they hold
	@echo "==> what the distributions hold"
	@$(PYTEST) -m "slow or not slow" tests/test_package.py tests/test_distributions.py
	@echo "==> building into dist"
	@rm -rf dist
	@$(BIN)/python -m build --quiet --no-isolation >/dev/null
	@$(BIN)/twine check --strict dist/*

lint: $(INSTALLED)  ## style, types and the order of imports
	@echo "==> ruff: style"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "==> mypy: types"
	@$(BIN)/mypy --no-error-summary
	@echo "==> import-linter: the order of the rooms"
	@$(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## rewrite the sources in the house style
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:  ## remove the environment, builds and caches
	@rm -rf $(VENV) $(NEWEST) build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without an interpreter that will do, nothing is made.
%/bin/pip:
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "make: $(PYTHON) must be Python 3.10 or newer with its venv module (try PYTHON=...)" >&2; exit 1; }
	@echo "==> creating $*"
	@$(PYTHON) -m venv $*

# PyTorch goes first and alone: it is most of the download, so a failure there is seen at once.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "==> installing PyTorch (once; a minute or more)"
	@$(PIP) torch numpy
	@echo "==> installing etflayers with its oracles and tools (once; about a minute)"
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

# The tools are those of the other environment; only its PyTorch, and the Triton that belongs to it, are not.
$(NEWEST)/.installed: pyproject.toml constraints.txt requirements-integrations.txt | $(NEWEST)/bin/pip
	@echo "==> installing the newest PyTorch with its frameworks, 6 GB (once; some minutes)"
	@grep -vE '^(torch|triton)==' constraints.txt >$(NEWEST)/constraints.txt
	@$(NEWEST)/bin/python $(PIP_INSTALL) -c $(NEWEST)/constraints.txt -r requirements-integrations.txt -e '.[$(EXTRAS)]'
	@touch $@
