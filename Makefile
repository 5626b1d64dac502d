# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. Another interpreter: PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint lgg bench wheel clean

demo: $(STAMP)
	$(BIN)/pfedsam demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --durations=15

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow --durations=15

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# Real data: make lgg LGG=<folder with the four site folders>
lgg: $(STAMP)
	@test -n "$(LGG)" || { echo "say where the data is: make lgg LGG=<folder>"; exit 2; }
	$(BIN)/pfedsam simulate "$(LGG)" --federation lgg --rounds 8 --seed 0 --out runs/lgg --validate-every 4 \
		--set image_size=64 --set batch_size=4 --set augmentations=2 \
		--set positives_per_case=4 --set negatives_per_case=2 $(LGG_SETTINGS)

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_cache.py
	$(BIN)/python tests/benchmarks/bench_payload.py
	$(BIN)/python tests/benchmarks/bench_memory.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
