# Two commands for everybody: `make train` and `make test`. A change of pyproject.toml, constraints.txt
# or the C sources installs anew.
.DEFAULT_GOAL := train
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
C_SOURCES := $(wildcard src/norm_matters/norms/kernels/c/*)
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: train test test-slow lint clean

train: .venv/installed
	$(BIN)/norm-matters train --model resnet8 --norm l1 --dataset digits --output runs

test: lint
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache src/*.egg-info src/norm_matters/norms/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt $(C_SOURCES)
	$(PIP) -e .
	touch $@

# Not after `installed`: that would compile the C kernels twice.
.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt $(C_SOURCES)
	$(PIP) -e '.[dev]'
	touch .venv/installed $@
