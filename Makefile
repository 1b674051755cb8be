# make demo   train a small transformer over four processes and compare it with one process
# make test   lint, types, tests and documentation
# make dist   build the wheel and the source archive, and check them
# All build their own virtual environment in .venv from nothing but Python >= 3.10: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Releases that kernels are compiled under, beside the one in constraints.txt, see tests/kernels/triton_releases.py.
TRITONS := 3.6.0 3.8.0 3.9.0
ONLY_3.9.0 := and python_version >= "3.11"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format pytest tritons docs dist bench clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

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

pytest: $(VENV)/.installed-dev tritons
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

tritons: $(TRITONS:%=$(VENV)/triton-%/.installed)

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

dist: $(VENV)/.installed-dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/check_dist.py dist

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/bench_planning.py
	$(BIN)/python benchmarks/bench_cpu.py

clean:
	rm -rf $(VENV) build dist docs/_build demo_output .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp an extra: installed again when what is asked for changes, and only then.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL) --constraint constraints.txt --editable '.[$*]'
	@touch $@

# Each beside the packages of the environment, where nothing imports it unasked.
$(VENV)/triton-%/.installed: | $(VENV)/.created
	$(INSTALL) --no-deps --upgrade --target $(@D) 'triton==$*; sys_platform == "linux" $(ONLY_$*)'
	@mkdir -p $(@D) && touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, $(PYTHON) is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@
