PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install lint test test-slow test-browser test-all docs linkcheck demo demo-short bench

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

# Ray has no wheel for every Python: without it its test skips, and says so.
test-slow: install
	-$(BIN)/pip install --quiet --editable ".[ray]"
	$(PYTEST) -m "slow and not browser" -rs

# What a user sees in TensorBoard and on a comparison's page; needs chromium, as in `apt-get install chromium`.
test-browser: install
	$(BIN)/pip install --quiet --editable ".[browser]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser -rs tests/test_browser.py

test-all: test test-slow test-browser

docs: install
	$(BIN)/pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# Links to other sites too, so it needs the network.
linkcheck: docs
	$(BIN)/sphinx-build -q -b linkcheck docs docs/_build/linkcheck

bench: install
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/quality.py
