PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install lint test test-slow test-all demo demo-short bench

$(BIN)/lightning-autolr: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[test,notebooks]"
	touch $@

install: $(BIN)/lightning-autolr

lint: install
	$(BIN)/pip install --quiet ruff mypy ".[bench]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The main job: AutoLRS on scikit-learn's digits, in about a minute.
demo: install
	$(BIN)/lightning-autolr fit --config configs/digits/autolrs.yaml

demo-short: install
	$(BIN)/lightning-autolr fit --config configs/digits/autolrs.yaml --trainer.max_steps 200

# Two processes of one thread each; torch's own threads would only get into each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m "slow and not browser"

test-all: test test-slow

bench: install
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/quality.py
