# Each target makes .venv from constraints.txt first, with just the packages that it needs.
#   PYTHON=python3.12   which Python makes .venv           ARGS="-k linear"   passed on to pytest
#   WORKERS=4           test processes, one thread each    PIPFLAGS=-v        let pip tell more
#   JAX=0               benchmarks without jax_privacy

PYTHON   ?= python3
WORKERS  ?= 2
PIPFLAGS ?= -qq
ARGS     ?=
JAX      ?= 1

VENV := .venv
BIN  := $(VENV)/bin
PIP   = $(BIN)/python -m pip --disable-pip-version-check
# Python compiles a module when it first imports it. To compile all of them here would take a minute more.
INSTALL = $(PIP) install $(PIPFLAGS) --no-compile -c constraints.txt
say   = @echo "==> $(1)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all bench lint format docs docs-check lock clean distclean

help: ## show this list
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

# ------------------------------------------------------------------------------------ environment

EXTRAS_demo  := demo
EXTRAS_test  := test,dev,bench
EXTRAS_bench := bench
EXTRAS_docs  := docs

$(BIN)/pip:
	$(call say,making $(VENV))
	@$(PYTHON) -c 'import sys; sys.exit("clipgrad needs Python 3.11 or newer: make PYTHON=/path/to/it" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

# hatchling comes first so that the build of the package itself is pinned as well.
$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(call say,installing clipgrad[$(EXTRAS_$*)] from constraints.txt: minutes the first time)
	@$(INSTALL) hatchling
	@$(INSTALL) --no-build-isolation -e '.[$(EXTRAS_$*)]'
	@$(if $(findstring bench,$(EXTRAS_$*)),$(BACKPACK))
	@touch $@

# It asks for torchvision, which it never imports, and whose builds do not fit every build of torch.
BACKPACK = $(INSTALL) --no-deps backpack-for-pytorch

# jax_privacy is measured beside clipgrad in an environment of its own: JAX and torch pin different packages.
$(VENV)-jax/.stamp: benchmarks/jax-constraints.txt
	$(call say,making $(VENV)-jax from benchmarks/jax-constraints.txt)
	@$(PYTHON) -m venv $(VENV)-jax
	@$(VENV)-jax/bin/python -m pip --disable-pip-version-check install $(PIPFLAGS) -r benchmarks/jax-constraints.txt
	@touch $@

# ------------------------------------------------------------------------------------------- work

demo: $(VENV)/.stamp-demo ## train a small model privately, and see what it costs
	$(call say,docs/examples/digits.py)
	@$(BIN)/python docs/examples/digits.py

lint: $(VENV)/.stamp-test ## ruff and mypy, changing nothing
	$(call say,ruff check)
	@$(BIN)/ruff check .
	$(call say,ruff format --check)
	@$(BIN)/ruff format --check .
	$(call say,mypy --strict clipgrad)
	@$(BIN)/mypy

format: $(VENV)/.stamp-test ## let ruff fix and format
	$(call say,ruff check --fix; ruff format)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# One thread a worker: at the tests' sizes threads only get in each other's way. Dozens of processes import torch, so
# Python keeps what it compiled whatever the environment says: without it each would take ten seconds more to start.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: lint ## lint, then the tests of every change, in minutes
	$(call say,pytest with $(WORKERS) workers)
	@$(PYTEST) $(ARGS)

test-all: lint ## lint, then every test and doctest, and every mode of the benchmarks once
	$(call say,pytest --nightly with $(WORKERS) workers)
	@$(PYTEST) --nightly $(ARGS)
	$(call say,pytest benchmarks/ --benchmark-disable: every mode once)
	@$(PYTEST) -q benchmarks/ --benchmark-disable $(ARGS)

bench: $(VENV)/.stamp-bench $(if $(filter-out 0,$(JAX)),$(VENV)-jax/.stamp) ## the throughput tables: plain PyTorch, clipgrad, other libraries
	$(call say,pytest benchmarks/)
	@$(BIN)/python -m pytest benchmarks/ --benchmark-columns=min,median,iqr,rounds $(ARGS)

docs: $(VENV)/.stamp-docs ## build the documentation into site/
	$(call say,zensical build)
	@$(BIN)/zensical build --clean --strict
	$(call say,done: site/index.html)

docs-check: docs ## build it, and open every page in a headless Chromium: links, errors, screenshots
	$(call say,python -m tests.site)
	@$(BIN)/python -m tests.site

# torch stays as pinned: raise its pin by hand, then run this.
lock: ## resolve constraints.txt anew
	$(call say,resolving all extras in $(VENV)-lock)
	@$(PYTHON) -m venv --clear $(VENV)-lock
	@$(VENV)-lock/bin/pip install $(PIPFLAGS) "$$(grep '^torch==' constraints.txt)" hatchling
	@$(VENV)-lock/bin/pip install $(PIPFLAGS) --no-build-isolation -e '.[accounting,bench,demo,dev,docs,huggingface,lightning,test]'
	@$(VENV)-lock/bin/pip install $(PIPFLAGS) --no-deps backpack-for-pytorch
	@sed -n '/^#/p' constraints.txt > $(VENV)-lock/constraints.txt
	@$(VENV)-lock/bin/pip freeze --all --exclude pip --exclude clipgrad | sed 's/+[a-z0-9.]*$$//' >> $(VENV)-lock/constraints.txt
	@mv $(VENV)-lock/constraints.txt constraints.txt
	@rm -rf $(VENV)-lock

clean: ## remove everything generated but .venv
	$(call say,removing caches and build products)
	@rm -rf digits.png build dist site site-pictures .benchmarks .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv as well
	$(call say,removing $(VENV))
	@rm -rf $(VENV) $(VENV)-jax
