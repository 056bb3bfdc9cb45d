# `make run`: the main job on the quickstart recipe. `make test`: the suite, ruff and mypy.
# What a bare Debian or Ubuntu needs first (make itself included):
APT = apt-get install -y make git g++ python3-venv python3-dev

PYTHON ?= python3
ROOT ?= $(CURDIR)/.envbuilder
VENV = .venv
BIN = $(VENV)/bin
ENV_PYTHON = $(ROOT)/envs/quickstart/bin/python
# The trainer is tested and type-checked in the built env; pytest and stubs, which it hasn't, come from here.
TEST_SITE = .cache/test-site
# What the tests of the curves read them with; the env's own packages come before.
TEST_VIEWERS = .cache/test-viewers

export ENVBUILDER_TEST_ROOT = $(ROOT)
# uv trusts whom the machine trusts, as pip and the tool do.
export UV_SYSTEM_CERTS ?= true

.PHONY: run test env dist lint test-unit test-trainer test-lab check-machine clean

run: $(VENV)/ready
	$(BIN)/envbuilder --root $(ROOT) pipeline recipes/quickstart.toml \
		--train recipes/train/quickstart.yaml --processes 2

test: lint test-unit test-trainer

lint: $(VENV)/ready $(TEST_SITE)/ready env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict envbuilder
	PYTHONPATH=$(TEST_SITE) $(BIN)/mypy --strict --python-executable $(ENV_PYTHON) trainer

test-unit: env
	$(BIN)/python -m pytest tests --ignore=tests/trainer --ignore=tests/lab -n 3 --instafail

test-trainer: $(TEST_SITE)/ready $(TEST_VIEWERS)/ready env
	# One thread a process: two processes on two cores, as under torchrun.
	OMP_NUM_THREADS=1 PYTHONPATH=$(TEST_SITE) $(ENV_PYTHON) -m pytest tests/trainer -n 2

# Needs root, the Debian packages slurm-wlm slurmdbd munge mariadb-server iproute2 squashfs-tools squashfuse lmod,
# and a /dev/fuse for every user. Most of its tests wait most of the time: so three files at once.
test-lab: $(VENV)/ready
	$(BIN)/python -m pytest tests/lab -n 3 --dist loadfile --instafail --durations=15

# The quickstart env: a second time it costs seconds.
env: $(VENV)/ready
	$(BIN)/envbuilder --root $(ROOT) lock --check recipes/quickstart.toml
	$(BIN)/envbuilder --root $(ROOT) fetch recipes/quickstart.toml
	$(BIN)/envbuilder --root $(ROOT) compile recipes/quickstart.toml

# One file that brings all that the tool needs, for machines that have nothing but Python (docs/one-file.md).
dist: $(VENV)/ready
	$(BIN)/python onefile/make.py dist/envbuilder.pyz

# The machine's own pip settings must not choose the tool's packages: --isolated keeps only the index.
$(VENV)/ready: pyproject.toml | check-machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --no-config --python $(BIN)/python --editable '.[dev]'
	touch $@

$(TEST_SITE)/ready: $(VENV)/ready
	$(BIN)/uv pip install --quiet --no-config --python $(BIN)/python --target $(TEST_SITE) pytest pytest-xdist types-pyyaml
	touch $@

$(TEST_VIEWERS)/ready: $(VENV)/ready
	$(BIN)/uv pip install --quiet --no-config --python $(BIN)/python --target $(TEST_VIEWERS) tensorboard wandb
	touch $@

check-machine:
	@missing=; \
	command -v git >/dev/null || missing="$$missing git"; \
	command -v c++ >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_paths()["include"] + "/Python.h")' 2>/dev/null \
		|| missing="$$missing python3-dev"; \
	if [ -n "$$missing" ]; then \
		echo "missing on this machine:$$missing"; echo "type (as root): $(APT)"; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v}: make PYTHON=python3.12 ...")'

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache
