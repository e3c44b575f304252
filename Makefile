# `make demo` and `make test` need nothing before them but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo experiments figures test test-slow bench lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python >= 3.11 is needed, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/gns demo

# the smoke preset from nothing to figures; rows that are there already are kept
experiments: $(STAMP)
	$(BIN)/python -m experiments.sweep --preset smoke
	$(BIN)/python -m experiments.figures --preset smoke

# every published figure and page again, from committed rows only, with what the README and a notebook show of them
figures: $(STAMP)
	$(BIN)/python -m experiments.redraw coverage frozen_rank gpu line_search live packed
	$(BIN)/python -m experiments.overhead.page experiments/results/overhead --readme README.md
	$(BIN)/python -m experiments.evidence --pages README.md experiments/README.md --notebook notebooks/optimal_batch.ipynb

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not gpu'

# what the monitor costs on this machine's CPU, beside its peers where they are installed; under 15 minutes on two
# quiet cores: into runs/overhead
bench: $(STAMP)
	$(BIN)/python -m experiments.overhead.bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
