# Commands for a newcomer: `make quickstart`, `make quickstart-lora` and `make test`. Each makes the virtual environment it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# DeepSpeed builds no operators on installation; the engine needs none of them.
export DS_BUILD_OPS := 0

.PHONY: quickstart quickstart-lora test lint types format coverage clean

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

quickstart-lora: $(VENV)/installed
	$(BIN)/python -m examples.quickstart_lora

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(VENV)/installed
	$(BIN)/python -m coverage erase
	COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml $(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	# torch first: DeepSpeed's own installation looks for it.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	# torchvision, which some tests compare with, is kept apart: transformers would resize images with it.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(VENV)/reference torchvision \
		|| echo "no torchvision: tests that compare with it will be skipped"
	touch $@

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
