# make demo     train a small U-Net and draw what it learned
# make test     lint, types, tests
# make test-versions   the tests on the oldest and on the newest Python, PyTorch and Triton, in virtual environments of
#                      their own; test-oldest and test-newest are one of them
# make verify   every operation against float64 truth, on this machine
# make gate     compile every kernel for every GPU, with no GPU, and read the machine code
# make ptx      execute what the kernels compile to on this CPU: errors, races, accesses out of bounds
# make faults   plant faults in the code, one at a time: do the tests notice?
# make coverage which lines the tests run, and which they do not
# make bench    time fastunet against plain PyTorch
#
# Each makes .venv if there is none and installs what it needs; the second time it starts at once.
# Variables: PYTHON (3.10 or newer), VENV, JOBS (test processes), TORCH (what to ask pip for), ARGS (passed on to
# demo, verify, gate, ptx, faults, coverage and bench: make demo ARGS="--images DIR --masks DIR").

SUPPORTED := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
JOBS ?= 2
ARGS ?=

# Without an NVIDIA GPU one version is named, so that pip prefers its +cpu build wherever pip is set up to find one.
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= torch==2.13.0
else
TORCH ?= 'torch>=2.10'
endif

BIN := $(VENV)/bin
TYPES := build/types

.PHONY: demo test test-oldest test-newest test-versions lint types unit verify gate ptx faults coverage bench clean

demo: $(VENV)/.fastunet
	$(BIN)/python -m fastunet demo $(ARGS)

test: lint types unit

lint: $(VENV)/.fastunet-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.fastunet-test
	@mkdir -p $(TYPES)/fastunet
	@ln -sfn ../../benchmarks $(TYPES)/benchmarks
	@find $(TYPES)/fastunet -type l -delete
	@ln -s $(CURDIR)/fastunet/* $(TYPES)/fastunet/
	@ln -s $(CURDIR)/kernels $(TYPES)/fastunet/kernels
	@cd $(TYPES) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

unit: $(VENV)/.fastunet-test
	$(BIN)/pytest -n $(JOBS) $(ARGS)

# What goes together: PyTorch, the Triton that it pins, and the NumPy that this Triton's interpreter takes; at the floor
# of what is served, and the newest there are. From the default package index these PyTorches are CUDA builds, some
# gigabytes to download, once, into environments of their own.
# Another pair goes the same way: make test-oldest PAIR="torch==2.14.0 triton==3.8.0" PAIR_VENV=.venv-2.14
PAIR ?= torch==2.10.0 triton==3.6.0 'numpy<2.4'
PAIR_VENV ?= .venv-oldest
NEWEST ?= torch triton numpy
NEWEST_VENV ?= .venv-newest
FIRST = $(shell for python in $(1); do $$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
OLDEST_PYTHON ?= $(call FIRST,python3.10 python3.11 python3.12 $(PYTHON))
NEWEST_PYTHON ?= $(call FIRST,python3.14 python3.13 python3.12 $(PYTHON))

test-oldest:
	$(MAKE) unit VENV=$(PAIR_VENV) TORCH="$(PAIR)" PYTHON="$(OLDEST_PYTHON)"

test-newest:
	$(MAKE) unit VENV=$(NEWEST_VENV) TORCH="$(NEWEST)" PYTHON="$(NEWEST_PYTHON)"

# Both ends; what cannot be installed here is named and costs the other nothing.
test-versions:
	@status=0; \
	$(MAKE) $(PAIR_VENV)/.fastunet-test VENV=$(PAIR_VENV) TORCH="$(PAIR)" PYTHON="$(OLDEST_PYTHON)" \
		&& { $(MAKE) test-oldest || status=1; } || { echo "not tested: the oldest cannot be installed here"; }; \
	$(MAKE) $(NEWEST_VENV)/.fastunet-test VENV=$(NEWEST_VENV) TORCH="$(NEWEST)" PYTHON="$(NEWEST_PYTHON)" \
		&& { $(MAKE) test-newest || status=1; } || { echo "not tested: the newest cannot be installed here"; }; \
	exit $$status

verify: $(VENV)/.fastunet-test
	$(BIN)/python -m fastunet verify $(ARGS)

gate: $(VENV)/.fastunet-test
	$(BIN)/python -m benchmarks.gate $(ARGS)

ptx: $(VENV)/.fastunet-test
	$(BIN)/python -m benchmarks.ptx $(ARGS)

faults: $(VENV)/.fastunet-test
	$(BIN)/python -m tests.faults $(ARGS)

coverage: $(VENV)/.fastunet-test
	$(BIN)/python -m tests.lines -n $(JOBS) $(ARGS)

bench: $(VENV)/.fastunet-test
	$(BIN)/pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) $(PAIR_VENV) $(NEWEST_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# ---- the virtual environment -------------------------------------------------------------------------------------

$(VENV)/.made:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "fastunet needs Python 3.10 or newer, which is not '$(or $(PYTHON),python3)': name one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

$(VENV)/.torch: | $(VENV)/.made
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo "Installing $(TORCH) (TORCH=... chooses another)"; $(BIN)/python -m pip install --quiet $(TORCH); }
	@touch $@

$(VENV)/.fastunet: pyproject.toml | $(VENV)/.torch
	@echo "Installing fastunet"
	@$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.fastunet-test: pyproject.toml | $(VENV)/.torch
	@echo "Installing fastunet and what its tests need"
	@$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.fastunet
