# Everything happens in .venv; the stamps there make a repeated call instant.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
TESTS  ?= tests

VENV    := .venv
BIN     := $(VENV)/bin
PACKAGES := $(VENV)/.packages
BUILT   := $(VENV)/.built
TOOLS   := $(VENV)/.tools
COMPILED := $(VENV)/.compiled
SOURCES := $(shell find csrc -type f -not -name '*.pyc')
EDITABLE := $(BIN)/pip install -q --no-build-isolation --no-warn-conflicts --editable

unexport PYTHONDONTWRITEBYTECODE # tests start hundreds of processes, and torch compiled anew takes each of them seconds

MAKEFLAGS += -j2 # while packages come over the network, kernels are compiled

.DEFAULT_GOAL := help
.PHONY: help build test sanitize clients demo bench docs lint format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

# --no-compile: most files of torch are never imported.
$(PACKAGES): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q setuptools pybind11 ninja
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q --no-compile $(TORCH)
	touch $@

$(BUILT): $(PACKAGES) $(SOURCES) setup.py
	$(EDITABLE) '.[cli]'
	touch $@

$(TOOLS): $(BUILT)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q --no-compile $(TRITON)
	$(BIN)/pip install -q --no-deps zipformer==0.1.3 torchao==0.18.0 accelerate==1.15.0
	$(EDITABLE) '.[test,bench,lint]'
	touch $@

build: $(BUILT)  ## make .venv and compile the kernels

# What tests need beside the installed module.
$(COMPILED): $(BUILT) tests/compiled.py
	$(BIN)/python tests/compiled.py
	touch $@

test: $(TOOLS) $(COMPILED)  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(TESTS)

sanitize: $(TOOLS)  ## run the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/sanitize.py -n $(JOBS)

clients: $(TOOLS)  ## try icefall's and ZipVoice's own files, from checkouts that ICEFALL and ZIPVOICE name
	PYTHONPATH=.:tests $(BIN)/python tests/real_clients.py

demo: $(BUILT)  ## encode recorded speech on the reference and on the best backend
	$(BIN)/python demo/demo.py

bench: $(TOOLS)  ## measure this machine: tables, JSON and plots under benchmarks/results
	$(BIN)/python -m benchmarks.harness

docs: $(TOOLS)  ## write the API page from docstrings, and the pages of results from results
	$(BIN)/python docs/make_api.py
	$(BIN)/python benchmarks/report.py

lint: $(TOOLS)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(TOOLS)  ## apply style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info zipformer_kernels/_native.* zipformer_kernels/_build.json $(BUILT) $(TOOLS) $(COMPILED)
