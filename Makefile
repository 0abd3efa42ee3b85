# Two commands are all that anybody needs: `make demo` and `make test`. Both set up the environment first.
PYTHON ?= python3
SEEDS ?= 1
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup test test-long demo bench-gpu lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup: ## create or refresh .venv (nothing to do: well under two seconds)
	@command -v $(PYTHON) >/dev/null || { echo "make setup: $(PYTHON) was not found: install Python 3.11 or newer, or name it with PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) tools/setup.py

# Two files at a time; with more threads each than there are cores, both would stall.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test: setup ## set up, then run the tests that this machine can run, all but the long ones
	@$(PYTEST) -m "not long"

test-long: setup ## set up, then run the long tests
	@$(PYTEST) -m long

demo: setup ## set up, then train and examine the lab's tiny models, GRPO last; SEEDS=3 for three seeds
	@$(BIN)/rl-lvr lab demo --out runs/demo --seeds $(SEEDS)

bench-gpu: setup ## time the fused operations on this machine's GPU; adds to benchmarks/results.csv
	@$(BIN)/python benchmarks/gpu.py

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove caches; keeps .venv and runs
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	@find rl_lvr rewards tests tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
