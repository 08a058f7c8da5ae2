# Needs python3 (3.11 or newer), make and a package index; everything else goes into .venv, but for
# the browser that the tests of the server's page install where there is none.
# A .venv is installed again only when requirements.txt or pyproject.toml changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint bench
.DELETE_ON_ERROR:

# Train both stages of a small model on this machine's documentation, write its memory bank, ask it.
demo: $(VENV)/.run
	$(BIN)/jaxlab demo --out runs/demo

test: $(VENV)/.dev $(VENV)/.browser
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Side by side with transformers on PyTorch; prints the command and the machine with its numbers.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/train_step_cpu.py

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxlab needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.run: $(VENV)/.made requirements.txt pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

# For the tests of the server's page: the browser that is there, else the system's package of it, else
# playwright's own.
$(VENV)/.browser: $(VENV)/.dev
	$(BIN)/python -m tests.serving.browser \
		|| (apt-get update -q && apt-get install -y -q --no-install-recommends chromium) \
		|| $(BIN)/playwright install --with-deps chromium
	touch $@

$(VENV)/.dev: $(VENV)/.made requirements.txt pyproject.toml
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@ $(VENV)/.run
