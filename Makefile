# make demo   train a small transformer over four processes and compare it with one process
# make test   lint, types, tests and documentation
# Both build their own virtual environment in .venv from nothing but Python >= 3.10: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format pytest docs bench clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.installed-viz
	$(BIN)/python examples/train_packed_documents.py

test: lint pytest docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TESTS)

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/bench_planning.py
	$(BIN)/python benchmarks/bench_cpu.py

clean:
	rm -rf $(VENV) build dist docs/_build demo_output .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp an extra: installed again when what is asked for changes, and only then.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, $(PYTHON) is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@
