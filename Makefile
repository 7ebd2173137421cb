# Each target alone sets up the environment on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
# A file's tests share what they capture, so they stay together.
WORKERS := -n 2 --dist loadfile

.PHONY: demo test test-all lint bench clean

test: lint
	$(BIN)/python -m pytest -q $(WORKERS)

test-all: lint
	$(BIN)/python -m pytest -q $(WORKERS) -m "not gpu"

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
