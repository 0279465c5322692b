# `make quickstart` and `make test` need nothing but Python 3.10+ and make: each sets up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What pip installs as torch, e.g. TORCH="torch==2.13.0 --index-url URL" for another build.
TORCH ?= torch==2.13.0

.PHONY: setup quickstart test test-slow test-newest test-gpu lint docs clean

setup: $(VENV)/.ready-dev

SOURCES := pyproject.toml setup.py scripts/setup_venv.sh $(wildcard csrc/*.*)
SET_UP = PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" bash scripts/setup_venv.sh

# What trains; tests and linters need more, lm-eval with its 0.5 GB above all.
$(VENV)/.ready: $(SOURCES)
	$(SET_UP)
	touch $@

$(VENV)/.ready-dev: $(SOURCES)
	EXTRAS=dev $(SET_UP)
	touch $(VENV)/.ready $@

# Two files at a time, each in one process: their fixtures start processes and train once for all tests of a file.
TWO_FILES := -n 2 --dist loadfile

test: setup
	$(BIN)/python -m pytest $(TWO_FILES) -m "not slow"

# The second part even where the first fails.
test-slow: setup
	$(BIN)/python -m pytest $(TWO_FILES) -m "slow and not alone"; status=$$?; \
	$(BIN)/python -m pytest -m "slow and alone" && exit $$status

# On the newest megatron-core, with a Python that it runs on: what touches megatron-core. At most 12 minutes on 2 cores.
NEWEST_CORE := megatron-core==0.19.2
NEWEST_VENV ?= .venv-newest
NEWEST := tests/mcore tests/checkpoint tests/training tests/megatron_lm tests/bridge tests/layout/test_placement_megatron.py \
  tests/evaluation/test_generate.py tests/evaluation/test_scoring.py tests/hf/test_export_model.py \
  tests/config/test_validate.py tests/test_agreement.py tests/test_doctor.py

$(NEWEST_VENV)/.ready: $(SOURCES) .ci/newest-python
	python=$${NEWEST_PYTHON:-$$(.ci/newest-python)} && PYTHON="$$python" VENV="$(NEWEST_VENV)" TORCH="$(TORCH)" \
	  CORE="$(NEWEST_CORE)" EXTRAS=pytest COPY=1 MEGATRON_SBLD_CUDA=off bash scripts/setup_venv.sh
	touch $@

test-newest: $(NEWEST_VENV)/.ready
	PYTHONPATH="$(CURDIR)" $(NEWEST_VENV)/bin/python -m pytest $(TWO_FILES) -m "not slow" $(NEWEST)

# What needs a CUDA device; from all other tests GPUs are hidden.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The generated pages anew, then all pages as HTML. A warning, such as a link to nothing, is an error.
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/docs
	@echo "open build/docs/docs/index.html"

quickstart: $(VENV)/.ready
	$(BIN)/python scripts/quickstart.py $(if $(TEXT),--text "$(TEXT)") $(if $(PROFILE),--measure)
