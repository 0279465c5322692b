# `make quickstart` and `make test` need nothing but Python 3.10+ and make: each sets up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What pip installs as torch, e.g. TORCH="torch==2.13.0 --index-url URL" for another build.
TORCH ?= torch==2.13.0

.PHONY: setup quickstart test test-slow lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py scripts/setup_venv.sh $(wildcard csrc/*.*)
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" bash scripts/setup_venv.sh
	touch $@

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quickstart: setup
	$(BIN)/python scripts/quickstart.py $(if $(TEXT),--text "$(TEXT)") $(if $(PROFILE),--profile)
