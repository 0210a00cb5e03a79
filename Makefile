# Set up, train, test and check. `make help` lists the targets; each of them installs what it needs first.

PYTHON ?= python3.11
VENV ?= .venv
WORKERS ?= 2

VENV_PYTHON = $(VENV)/bin/python
# One thread in each test process: PyTorch's threads spin while they wait, and take the cores from the other worker.
PYTEST = OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test test-slow lint types format docs clean

help:
	@echo 'make train        train on HalfCheetah-v5 for about 15 minutes: recipes/configs/quickstart.yaml'
	@echo 'make train ARGS="--env Hopper-v5 --seed 1"'
	@echo '                  run recipes/mujoco_qsm.py with these arguments instead ("--help" lists them)'
	@echo 'make test         run the tests, without the slow ones; ARGS="-k schedule" is passed on to pytest'
	@echo 'make test-slow    run the slow tests'
	@echo 'make lint         check style and formatting'
	@echo 'make types        check the types of the package'
	@echo 'make format       fix style and formatting'
	@echo 'make docs         serve the documentation at http://127.0.0.1:8000'
	@echo 'make clean        remove caches and build products (not $(VENV), not runs/)'
	@echo
	@echo 'PYTHON=$(PYTHON)  the interpreter for the virtual environment, 3.11 or newer'
	@echo 'VENV=$(VENV)  the folder of the virtual environment'
	@echo 'WORKERS=$(WORKERS)  number of parallel test processes'

train: $(VENV)/.installed-test
	$(VENV_PYTHON) recipes/mujoco_qsm.py $(or $(ARGS),--config recipes/configs/quickstart.yaml)
	@$(if $(ARGS),:,echo 'The full run, 1,000,000 frames: make train ARGS="--env HalfCheetah-v5"')

test: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

types: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m mypy

format: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs serve $(ARGS)

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find qsm_rl recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra, written last: an interrupted install leaves none, so the next call installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo '"$(PYTHON)" is not Python 3.11 or newer. Install Python 3.11, or name another interpreter: make PYTHON=python3.12 ...' >&2; \
	    exit 1; }
	@echo 'Installing qsm_rl[$*] into $(VENV): about two minutes the first time, longer if torch comes with CUDA.'
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(VENV_PYTHON) -m pip --disable-pip-version-check install --quiet -c constraints.txt -e ".[$*]"
	@touch $@
