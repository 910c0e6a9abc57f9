PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMALL := $(VENV)/.installed-demo
PIP := $(BIN)/python -m pip install -c constraints.txt
# Without an NVIDIA GPU the small PyTorch does, 0.2 GB instead of 3 GB and more; where its index cannot be reached, pip's own does too.
TORCH := test -e /dev/nvidiactl || test "$$(uname -s)" != Linux \
	|| $(PIP) --quiet --retries 0 --index-url https://download.pytorch.org/whl/cpu torch || true

# Tests that meet transformers, for each end of the versions that pyproject.toml allows.
OLDEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
COMPAT_TESTS ?= tests/models tests/distill tests/integrations tests/engine/test_equality.py tests/engine/test_states.py tests/scripts/test_examples.py

.PHONY: demo test test-compat compat-oldest compat-newest compat-triton lint format install

demo: $(SMALL)
	$(BIN)/specontext demo
	@if $(BIN)/python -c 'from specontext.cli.demo_document import check_packaged; check_packaged()' 2>/dev/null; \
		then $(BIN)/specontext demo smollm2; fi

# Processes that tests start do not compile the package again, each for itself.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

test-compat: compat-oldest compat-newest compat-triton

compat-oldest: ASKED = transformers==$(OLDEST)
compat-newest: ASKED = transformers<6
compat-oldest compat-newest: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target .compat/$@ '$(ASKED)'
	PYTHONPATH=$(CURDIR)/.compat/$@ $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONDONTWRITEBYTECODE= PYTHONPATH=$(CURDIR)/.compat/$@ $(BIN)/python -m pytest $(COMPAT_TESTS)

# The Triton of the oldest PyTorch: kernels are compiled by it for a GPU, not run.
compat-triton: $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .compat/$@ triton==3.4.0
	PYTHONDONTWRITEBYTECODE= TRITON_INTERPRET=0 PYTHONPATH=$(CURDIR)/.compat/$@ $(BIN)/python -m pytest -p tests.compile_only tests/kernels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# What the demo needs, and no more; an environment for development has it too.
$(SMALL): pyproject.toml constraints.txt | $(VENV)
	@$(TORCH)
	test -e $(STAMP) || $(PIP) -e .
	touch $@

$(STAMP): pyproject.toml constraints.txt | $(VENV)
	@$(TORCH)
	$(PIP) -e '.[dev,plots]'
	touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "specontext needs Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
