# make train | make test | make lint: each works on a fresh clone. It makes .venv with the best Python it finds.
CONFIG ?= quickstart
ARGS ?=
VENV ?= .venv
# PYTHON=/path/to/python picks the interpreter of a new .venv.
PYTHON ?=
RUN = $(VENV)/bin/python
TESTS = JAX_PLATFORMS=cpu $(RUN) -m pytest -n auto --maxprocesses=8
TARGETS = $(VENV)-targets

.PHONY: help train test targets kernels faults pods conformance peers lint format table install clean
.DEFAULT_GOAL := help

help:
	@echo "make train [CONFIG=$(CONFIG)] [ARGS=\"--optim.peak-lr=1e-3\"]   install, then train a config"
	@echo "make test [ARGS=\"tests/ops\"]   install, then lint and run the tests"
	@echo "make faults                    kill, freeze and starve runs (minutes; docs/faults.md)"
	@echo "make targets                   what compiles for absent chips, in $(TARGETS)"
	@echo "make kernels                   the kernels, interpreted and compiled for H100s and TPUs; a part of make test"
	@echo "make pods                      compile the large configs for TPU slices (minutes each)"
	@echo "make conformance               every catalogue row through every property"
	@echo "make peers                     install public PyTorch code, compare with it, write docs/peer_checks.md"
	@echo "make lint | format | table | clean"

# The stamp names the metadata that the environment was installed from; a change of either file installs again.
$(VENV)/installed: setup.cfg pyproject.toml tools/install.sh tools/python.sh
	@sh tools/install.sh "$(VENV)" "$(PYTHON)"

install: $(VENV)/installed

train: $(VENV)/installed
	@$(RUN) -m experiments.train --config=$(CONFIG) $(ARGS)

# The kernels' tests need Python >= 3.12; where there is none, they are skipped, but for those in the TPU interpreter.
test: $(VENV)/installed lint
ifneq ($(ARGS),)
	@$(TESTS) $(ARGS)
else
	@if sh tools/python.sh 12 >/dev/null 2>&1; then \
		$(TESTS) tests --ignore=tests/pallas_kernels && $(MAKE) --no-print-directory kernels; \
	else \
		echo "no Python >= 3.12: most tests of the kernels are skipped" >&2; $(TESTS) tests; \
	fi
endif

faults: $(VENV)/installed
	@JAX_PLATFORMS=cpu $(RUN) -m pytest -m "" tests/faults $(ARGS)

# What compiles for chips that are not here has an environment of its own: where libtpu is installed, jax looks for TPUs.
$(TARGETS)/installed: setup.cfg pyproject.toml tools/install.sh tools/python.sh
	@sh tools/install.sh "$(TARGETS)" "" dev,targets 12

targets: $(TARGETS)/installed

kernels: $(TARGETS)/installed
	@JAX_PLATFORMS=cpu $(TARGETS)/bin/python -m pytest -n auto --maxprocesses=8 \
		tests/pallas_kernels tests/ops/test_linear_kernels.py tests/ops/test_scan_kernels.py \
		tests/ops/test_block_sparse_kernels.py tests/ops/test_context_kernels.py tests/ops/test_summed_weights.py \
		tests/ops/test_token_block_kernels.py tests/ops/test_step_kernels.py \
		tests/ops/test_block_groups.py::test_kernels_match_float64 \
		tests/ops/test_block_groups.py::test_kernels_take_a_call_whose_tokens_choose_blocks_of_128 tests/pods $(ARGS)

pods: $(TARGETS)/installed
	@JAX_PLATFORMS=cpu $(TARGETS)/bin/python -m pytest -m "pods or tpu" tests/pods $(ARGS)

conformance: $(VENV)/installed
	@$(TESTS) -m "not faults and not pods" tests/conformance $(ARGS)

# The peers come without their dependencies and without compiling CUDA: a few files of theirs run, on the CPU.
peers: $(VENV)/installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev,peers]"
	@MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		CAUSAL_CONV1D_FORCE_BUILD=TRUE $(RUN) -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation -r tests/peers/requirements.txt
	@JAX_PLATFORMS=cpu $(RUN) -m pytest tests/peers
	@JAX_PLATFORMS=cpu $(RUN) -m tools.peer_checks

lint: $(VENV)/installed
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(VENV)/installed
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(TARGETS) build dist *.egg-info

# The tables of mechanisms in README.md and WORKSPACE.md, from the catalogue.
table: $(VENV)/installed
	@$(RUN) tools/table.py
