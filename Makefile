# Each target alone sets up the environment on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint bench clean

test: lint
	$(BIN)/python -m pytest -q

test-all: lint
	$(BIN)/python -m pytest -q -m "not gpu"

demo: .venv/ready
	$(BIN)/python -m benchmarks.demo

bench: .venv/ready
	$(BIN)/python -m benchmarks.decode

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and pinned: unpinned, another package could pull the CUDA build of several gigabytes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,triton]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
