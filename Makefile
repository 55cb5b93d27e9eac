PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install lint test test-all demo demo-short bench

$(BIN)/lightning-autolr: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

install: $(BIN)/lightning-autolr

lint: install
	$(BIN)/pip install --quiet ruff mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The main job: AutoLRS on scikit-learn's digits, in about a minute.
demo: install
	$(BIN)/lightning-autolr fit --config configs/digits/autolrs.yaml

demo-short: install
	$(BIN)/lightning-autolr fit --config configs/digits/autolrs.yaml --trainer.max_steps 200

test: install
	$(BIN)/python -m pytest -q

test-all: install
	$(BIN)/python -m pytest -q -m "not browser"

bench: install
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/quality.py
