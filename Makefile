# Two commands do everything from nothing: `make bench` is the main job, `make test` passes the tests.
#
#   make build       .venv with the pinned requirements, and the native code in place (tokenkernels/*.so)
#   make bench       checks, then times every op against what people use today; QUICK=1 takes under 2 minutes
#   make test        all tests; SANITIZE=1 runs the op tests on a build with address and undefined-behaviour checks
#   make gpu         on a machine with an NVIDIA GPU: checks, measures, records; BUDGET=seconds ONLY="words" PYTHON=python3
#   make lint        ruff, mypy and clang-format, as pinned; `make format` mends what they can mend
#   make clean       removes what was built; `make distclean` the environment too
#
# PYTHON=… chooses the interpreter of .venv; pip itself is configured as usual (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, …).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := PYTHONPATH=.:python $(VENV)/bin/python
ENABLED = $(filter-out 0 no off false,$(1))
VARIANT := $(if $(call ENABLED,$(SANITIZE)),sanitize,release)
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
BUILD_OPTIONS := $(if $(filter sanitize,$(VARIANT)),\
	TOKENKERNELS_BUILD=build/sanitize CMAKE_ARGS="-DTOKENKERNELS_SANITIZE=ON")
CXX_FILES = $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')
SANITIZED := tests/test_ops.py tests/test_junk.py tests/test_numpy.py $(wildcard tests/ops)
# The checked object is loaded by a Python that is not: the run-time libraries have to be there first.
PRELOAD = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

.PHONY: help build bench gpu test lint format clean distclean
.DEFAULT_GOAL := help

help:
	@sed -n '3,10s/^#//p' Makefile

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements-dev.txt)"
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# Without it, where this Python has no such Triton, its tests are skipped.
$(VENV)/oldest/installed: $(VENV)/installed requirements-oldest.txt
	rm -rf $(VENV)/oldest && mkdir $(VENV)/oldest
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(VENV)/oldest -r requirements-oldest.txt || \
		echo "Left out: the oldest Triton."
	@touch $@

# One variant in place at a time: building one takes the stamp and the objects of the other away.
build/$(VARIANT).stamp: $(VENV)/installed $(SOURCES)
	@mkdir -p build && rm -f build/*.stamp tokenkernels/*.so
	$(BUILD_OPTIONS) $(VENV)/bin/python setup.py --quiet build_ext --inplace
	@touch $@

build: build/$(VARIANT).stamp
	@command -v nvcc > /dev/null || echo "Left out: the CUDA kernels (no nvcc in PATH). Everything on the CPU is there."

bench: build
	$(RUN) -m bench $(if $(call ENABLED,$(QUICK)),--quick)

# No environment is made here: such machines bring their own, and often have no network.
gpu:
	PYTHONPATH=.:python:$$PYTHONPATH $(PYTHON) -m bench.gpu --budget $(or $(BUDGET),540) --only "$(ONLY)" --out "$(OUT)"

test: build $(VENV)/oldest/installed
	$(if $(filter sanitize,$(VARIANT)),$(PRELOAD)) $(RUN) -m pytest --numprocesses auto --dist worksteal \
		$(if $(filter sanitize,$(VARIANT)),$(SANITIZED))

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info tokenkernels/*.so

distclean: clean
	rm -rf $(VENV)
