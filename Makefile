# What one types in this repository; `make` alone lists it.
# Needs git, make and a Python 3.10 or newer.  Everything else goes into .venv, which can be deleted at any time.

ROOT := $(shell cd "$$(dirname '$(strip $(MAKEFILE_LIST))')" && pwd)
BIN := $(ROOT)/.venv/bin
JOBS ?= 2# processes that test side by side; the largest tests take 8 GB each
SHELL := /bin/sh

# The first Python that starts and is new enough; `make PYTHON=/path/to/python` chooses another, and .venv is
# built anew when that one has another version.
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
PYTHON ?= $(shell for each in $(CANDIDATES); do \
	"$$each" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$each" && break; done)

# A shell set up for ROS or conda lends its packages to every Python; ours must not see them.
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: help demo test check clean environment

help:
	@echo "make demo    export nano to ONNX, verify it, ask it three questions, benchmark it, write a report"
	@echo "make test    run the tests (arguments: make test JOBS=1 ARGS='tests/unit -k image')"
	@echo "make check   ruff, format, mypy --strict, pyright, import-linter"
	@echo "make clean   delete demo/ and the tools' caches; .venv stays"

demo: environment
	@cd "$(ROOT)" && "$(BIN)/python" export/demo.py demo

test: environment
	@cd "$(ROOT)" && "$(BIN)/python" -m pytest -rs -n $(JOBS) --dist loadfile $(ARGS)

check: environment
	@cd "$(ROOT)" && echo "ruff check"        && "$(BIN)/ruff" check .
	@cd "$(ROOT)" && echo "ruff format"       && "$(BIN)/ruff" format --check .
	@cd "$(ROOT)" && echo "mypy --strict"     && "$(BIN)/mypy" --strict
	@cd "$(ROOT)" && echo "pyright"           && "$(BIN)/pyright"
	@cd "$(ROOT)" && echo "import-linter"     && "$(BIN)/lint-imports" --no-logo

clean:
	cd "$(ROOT)" && rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	cd "$(ROOT)" && find edgevlm export quant runtimes bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

environment:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found; install one, or: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" "$(ROOT)/.ci/environment.py"$(if $(filter file,$(origin PYTHON)),, --this-python)
