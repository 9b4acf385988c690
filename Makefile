# make run: set up everything and run the main job.   make test: set up everything and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test slow setup check lint types imports clean

run: setup
	$(BIN)/gptcore run

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: setup
	$(BIN)/python -m pytest -m slow -n 3 --dist loadfile --no-loadscope-reorder

setup: $(VENV)/installed

# Installed again whenever the dependencies change. The stamp is written last, so an interrupted set-up is taken up again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptcore needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

check: setup lint types imports test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
