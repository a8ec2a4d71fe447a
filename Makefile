# Everything a user needs: `make demo` and `make test` work on a fresh machine.
# PYTHON, VENV and TORCH (e.g. TORCH=torch==2.13.0 or a wheel) may be set on the command line.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch>=2.9
OUT    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: demo test test-slow check format docs dist clean install install-dev install-docs

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-docs: $(VENV)/.installed-docs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

demo: install
	$(BIN)/msdiff demo --out $(OUT)

# one process per core, each with one thread: tests are many and small
test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: install-dev install-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist worksteal

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the documentation as a site; its search needs a server: python3 -m http.server -d site
docs: install-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# wheel and source archive
dist: install-docs
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
