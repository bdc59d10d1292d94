# Everything happens in .venv; the stamps there make a repeated call instant.
PYTHON ?= python3
TORCH  ?= torch==2.13.0 triton==3.6.0
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
TESTS  ?= tests

VENV    := .venv
BIN     := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BUILT   := $(VENV)/.built
SOURCES := $(shell find csrc -type f -not -name '*.pyc')

.DEFAULT_GOAL := help
.PHONY: help build test demo bench lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

$(PACKAGES): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q setuptools pybind11 ninja
	$(BIN)/python -c 'import torch, triton' 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q --no-deps zipformer==0.1.3
	touch $@

$(BUILT): $(PACKAGES) $(SOURCES) setup.py
	$(BIN)/pip install -q --no-build-isolation --no-warn-conflicts --editable '.[test,bench,lint]'
	touch $@

build: $(BUILT)  ## make .venv, install what the tests need, compile the kernels

test: build  ## run all tests
	PYTHONPATH=tests $(BIN)/python -c 'from emulator import emulated_module; emulated_module()'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(TESTS)

demo: build  ## encode recorded speech on the reference and on the best backend
	$(BIN)/python demo/demo.py

bench: build  ## measure this machine: tables, JSON and plots under benchmarks/results
	$(BIN)/zipformer-kernels bench

lint: build  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: build  ## apply style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info zipformer_kernels/_native.* zipformer_kernels/_build.json $(BUILT)
