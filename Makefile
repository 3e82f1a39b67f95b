# make train | make test | make lint: each works on a fresh clone. It makes .venv with the best Python it finds.
CONFIG ?= quickstart
ARGS ?=
VENV ?= .venv
# PYTHON=/path/to/python picks the interpreter of a new .venv.
PYTHON ?=
RUN = $(VENV)/bin/python

.PHONY: help train test faults pods conformance peers lint format table install clean
.DEFAULT_GOAL := help

help:
	@echo "make train [CONFIG=$(CONFIG)] [ARGS=\"--optim.peak-lr=1e-3\"]   install, then train a config"
	@echo "make test [ARGS=\"tests/ops\"]   install, then lint and run the tests"
	@echo "make faults                    kill, freeze and starve runs (minutes; docs/faults.md)"
	@echo "make pods                      install libtpu apart, compile the large configs for TPU slices (minutes each)"
	@echo "make conformance               every catalogue row through every property"
	@echo "make peers                     install public PyTorch code, compare with it, write docs/peer_checks.md"
	@echo "make lint | format | table | clean"

# The stamp names the metadata that the environment was installed from; a change of either file installs again.
$(VENV)/installed: setup.cfg pyproject.toml tools/install.sh
	@sh tools/install.sh "$(VENV)" "$(PYTHON)"

install: $(VENV)/installed

train: $(VENV)/installed
	@$(RUN) -m experiments.train --config=$(CONFIG) $(ARGS)

test: $(VENV)/installed lint
	@JAX_PLATFORMS=cpu $(RUN) -m pytest -n auto --maxprocesses=8 $(if $(ARGS),$(ARGS),tests)

faults: $(VENV)/installed
	@JAX_PLATFORMS=cpu $(RUN) -m pytest -m "" tests/faults $(ARGS)

# libtpu has an environment of its own: where it is installed, jax looks for TPUs.
$(VENV)-pods/installed: setup.cfg pyproject.toml tools/install.sh
	@sh tools/install.sh "$(VENV)-pods" "$(PYTHON)" dev,tpu

pods: $(VENV)-pods/installed
	@JAX_PLATFORMS=cpu $(VENV)-pods/bin/python -m pytest -m "pods or tpu" tests/pods $(ARGS)

conformance: $(VENV)/installed
	@JAX_PLATFORMS=cpu $(RUN) -m pytest -n auto --maxprocesses=8 tests/conformance $(ARGS)

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
	rm -rf $(VENV) $(VENV)-pods build dist *.egg-info

# The tables of mechanisms in README.md and WORKSPACE.md, from the catalogue.
table: $(VENV)/installed
	@$(RUN) tools/table.py
