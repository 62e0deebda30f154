# Airlock's commands; `make` alone lists them. Everything runs from .venv, which `setup` makes and keeps up to date.
.DEFAULT_GOAL := help
.PHONY: help setup demo test bench fuzz lint lock clean
MAKEFLAGS += --no-print-directory

# A Python that is active in the caller's shell must not leak into ours.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

bin := .venv/bin
step := @bash deploy/step.sh
pytest := AIRLOCK_REQUIRE_BACKENDS=$${AIRLOCK_REQUIRE_BACKENDS-bubblewrap,docker,gvisor} $(bin)/python -m pytest tests \
	--ignore=tests/benchmarks

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18

setup: ## make .venv with airlock in it, and install the system packages that lack (PYTHON=... picks the interpreter)
	@bash deploy/setup.sh

demo: setup ## find a needle in ten million characters with a local model (SCRIPTED=1: no model, a few seconds)
	@bash deploy/demo.sh

test: ## set up, lint, run all tests
	@bash deploy/setup.sh tests
	@bash deploy/engines.sh
	@$(MAKE) lint
	@$(pytest) --numprocesses 3 --dist loadfile -m "not alone" || { echo "test: step 'pytest' failed" >&2; exit 1; }
	@$(pytest) -m alone || { echo "test: step 'pytest, one at a time' failed" >&2; exit 1; }

bench: setup ## measure, and compare with the peers
	@$(bin)/python -m tests.benchmarks

fuzz: setup ## fuzz what the host parses of a guest (FUZZ_S=600); what is new goes to bench-results/corpus
	@mkdir -p bench-results/corpus
	@$(bin)/python -m tests.fuzz.channel -max_total_time=$${FUZZ_S:-600} bench-results/corpus tests/fuzz/corpus

lint: setup ## style, types and the direction of imports
	$(step) 'ruff check' $(bin)/ruff check --output-format concise .
	$(step) 'ruff format' $(bin)/ruff format --check .
	$(step) 'pyright' $(bin)/pyright
	$(step) 'import-linter' $(bin)/lint-imports

lock: ## bring requirements.lock in line with pyproject.toml (UPGRADE=1: the newest of everything)
	@bash deploy/lock.sh

clean: ## remove .venv, caches and build products; the data folder stays
	@rm -rf .venv .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist bench-results
	@find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
