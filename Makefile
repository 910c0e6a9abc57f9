PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests that meet transformers, for each end of the versions that pyproject.toml allows.
OLDEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
COMPAT_TESTS ?= tests/models tests/distill tests/integrations tests/engine/test_equality.py tests/scripts/test_examples.py

.PHONY: demo test test-compat compat-oldest compat-newest lint format install

demo: $(STAMP)
	$(BIN)/specontext demo
	@if $(BIN)/python -c 'from specontext.cli.demo_document import check_packaged; check_packaged()' 2>/dev/null; \
		then $(BIN)/specontext demo smollm2; fi

test: $(STAMP)
	$(BIN)/python -m pytest

test-compat: compat-oldest compat-newest

compat-oldest: ASKED = transformers==$(OLDEST)
compat-newest: ASKED = transformers<6
compat-oldest compat-newest: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target .compat/$@ '$(ASKED)'
	PYTHONPATH=$(CURDIR)/.compat/$@ $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(CURDIR)/.compat/$@ $(BIN)/python -m pytest $(COMPAT_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "specontext needs Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,plots]'
	touch $@
