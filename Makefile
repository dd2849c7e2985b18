# `make demo` and `make test` do all the set-up on a fresh machine: they need Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint types benchmark clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/pe-patch demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/patch_cost.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/bloom.py

clean:
	rm -rf $(VENV) report build dist *.egg-info
