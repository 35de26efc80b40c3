# Everything on a machine that has only Python 3.10+ and a C++ compiler.
# PYTHON=python3.12 chooses the interpreter, FAST=1 the quick part of the tests.

PYTHON ?= python3
BIN := .venv/bin
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py pyproject.toml MANIFEST.in README.md constraints.txt $(CPP) $(shell find fastflow -name '*.py')

.PHONY: demo test bench gpu lint clean

# -I: the installed package, not the checkout, which has no compiled kernels
demo: .venv/installed
	rm -rf demo
	$(BIN)/python -I -m fastflow.demo demo

# what was installed is tested, not the checkout: its doctests, then tests/
test: .venv/installed
	$(BIN)/pytest --pyargs fastflow tests $(if $(FAST),-m "not slow")

bench: .venv/installed
	$(BIN)/fastflow bench --json benchmarks/results/speed.json
	$(BIN)/python -I -m fastflow.bench.table benchmarks/results/speed.json README.md

# on a machine with a GPU, from the checkout, with what its $(PYTHON) has: torch, and CuPy or Triton; nothing is
# installed. PART=verify, glow or bench does one part; figures go to $$OUT or benchmarks/results
gpu:
	PYTHONPATH=. $(PYTHON) -m fastflow.bench.gpu $(PART)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

clean:
	rm -rf .venv build dist demo *.egg-info fastflow/*.so

# again whenever a source has changed; build/lib would keep files that are gone
.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -rf build/lib*
	$(BIN)/pip install --quiet -c constraints.txt '.[test]'
	touch $@
