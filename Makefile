# Every target prepares what it needs. Needed on the machine: git, make, Python >= 3.11 and a package index.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# torch and torchvision are named beside the packages that depend on them: pip would otherwise replace torch.
# Their versions, and all others, come from constraints.txt.
PACKAGES := torch torchvision -e '.[dev]'

# One thread per process: on a small machine two thread pools slow each other down more than they help.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ifeq ($(shell uname -s),Linux)
TEST_ENV += GLOO_SOCKET_IFNAME=lo
endif

# -P keeps the repository root off sys.path, where data/ and recipes/ would be importable.
PYTEST := $(TEST_ENV) $(RUN) -P -m pytest

.DEFAULT_GOAL := help
.PHONY: demo demo-long demo-towers test test-all lint bench clean help

demo: $(STAMP) ## Train a small real model with and without CAL on real images, evaluate both by lmms-eval, report (20 to 30 minutes)
	$(RUN) -m cal_train demo

demo-long: $(STAMP) ## The same with a 135M language model and three seeds (hours)
	$(RUN) -m cal_train demo --long

demo-towers: $(STAMP) ## Pretrain small real towers by every method on the same budget, one table (about 12 minutes)
	$(RUN) -m cal_train demo_towers

test: $(STAMP) ## Run the fast tests
	$(PYTEST)

test-all: $(STAMP) ## Run all tests, slow and several-process ones included
	$(PYTEST) -m "not gpu"

lint: $(STAMP) ## Check style, formatting and types (ruff, pyright)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: $(STAMP) ## Print the benchmark tables (benchmarks/*.py, one after the other)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(RUN) "$$script"; done

clean: ## Remove caches and build output; .venv, runs/ and downloads stay
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    f"cal_train needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.x ...")'
	@echo "Setting up $(VENV): several minutes and about 8 GB the first time"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt $(PACKAGES)
	@touch $@
