# Everything a user needs: `make demo` and `make test` work on a fresh machine.
# PYTHON, VENV and TORCH (e.g. TORCH=torch==2.13.0 or a wheel) may be set on the command line.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch>=2.9
OUT    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: demo test test-slow check format clean install install-dev

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: install
	$(BIN)/msdiff demo --out $(OUT)

# one process per core, each with one thread: tests are many and small
test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist worksteal

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
