# `make help` lists the targets. PYTHON is the interpreter (of a virtual environment) to work with.

PYTHON ?= python3
JOBS ?= $(shell nproc)
# Python tests at once: most of their time is one thread's.
WORKERS ?= 2
FUZZ_SECONDS ?= 300
PYTEST = $(PYTHON) -m pytest -n $(WORKERS)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# What the environment holds (cmake, ninja, ruff, mypy, clang-format) comes before the system's.
export PATH := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$(PATH)

CPP_FILES = $(shell find csrc tests/cpp bench -name '*.h' -o -name '*.cc')
APT_PACKAGES = build-essential libgtest-dev libbenchmark-dev

.PHONY: help ci install-test-deps develop check docs format format-check lint types test test-cpp \
        test-asan test-tsan test-python test-isa bench bench-smoke fuzz clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

ci: install-test-deps check ## Install all that the tests need and ktrt itself, then run everything

install-test-deps: ## System packages (Debian, Ubuntu) and `pip install '.[test]'`
	@if command -v apt-get >/dev/null; then \
	  dpkg -s $(APT_PACKAGES) >/dev/null 2>&1 || { \
	    $(SUDO) apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -yq --no-install-recommends $(APT_PACKAGES); }; \
	else echo "not a Debian system; needed: C++ compiler, make, GoogleTest, Google Benchmark"; fi
	$(PYTHON) -m pip install '.[test]'

develop: ## Rebuild and install ktrt alone, incrementally (needs scikit-build-core, pybind11, cmake, ninja)
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -C build-dir=build/python .

check: format-check lint types test-cpp test-asan test-tsan test-python test-isa bench-smoke ## Run every check

format: ## Rewrite C++ and Python sources in the project's format
	clang-format -i $(CPP_FILES)
	ruff format .
	ruff check --fix-only -q .

docs: ## Write the generated tables of docs/: keys, templates, families (of the installed transformers)
	for table in configuration_tables templates_table families_table; do \
	  $(PYTHON) tests/python/helpers/$$table.py || exit 1; done

format-check:
	clang-format --dry-run -Werror $(CPP_FILES)
	ruff format --check .

lint: ## ruff
	ruff check .

types: ## mypy --strict
	$(PYTHON) -m mypy

test: test-cpp test-python ## C++ and Python tests

test-cpp: ## C++ tests, as users run the code
	cmake --preset release && cmake --build --preset release -j $(JOBS) && ctest --preset release

test-asan: ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake --preset asan && cmake --build --preset asan -j $(JOBS) && ctest --preset asan

test-tsan: ## Tests of the thread pool, the layer and the hand-off under ThreadSanitizer
	cmake --preset tsan && cmake --build --preset tsan -j $(JOBS) && ctest --preset tsan

test-python: ## Python tests (of the checkout's Python and the installed module)
	$(PYTEST) --dist loadfile

test-isa: ## End-to-end Python tests on each instruction set below the machine's own
	@for isa in $$($(PYTHON) -c 'from ktrt import _core as c; \
	    order = ["portable", "avx2", "avx512", "amx"]; print(*order[:order.index(c.detected_isa())])'); do \
	  echo "KTRT_ISA=$$isa"; KTRT_ISA=$$isa $(PYTEST) --dist worksteal -q -m end_to_end || exit 1; done

fuzz: ## Damaged files and hostile calls with new seeds, FUZZ_SECONDS each; what fails is kept
	$(PYTHON) tests/fuzz/fuzz_files.py $(FUZZ_SECONDS)
	$(PYTHON) tests/fuzz/fuzz_calls.py $(FUZZ_SECONDS)

bench: ## All micro-benchmarks (the comparison with kt_kernel: python bench/kt_kernel/compare.py)
	cmake --preset release && cmake --build --preset release -j $(JOBS)
	for b in build/release/bench/bench_*; do [ ! -x $$b ] || $$b || exit 1; done

bench-smoke: ## Each micro-benchmark once, briefly, so that none rots
	cmake --preset release && cmake --build --preset release -j $(JOBS)
	for b in build/release/bench/bench_*; do [ ! -x $$b ] || $$b --benchmark_min_time=0.001 || exit 1; done
	$(PYTHON) bench/cpu_decode.py --quick --cache build/bench-cache
	@if $(PYTHON) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("kt_kernel") is None)'; then \
	  $(PYTHON) bench/kt_kernel/compare.py --dtypes int8 --ranks 8 --qlens 1 --layers 1 --rounds 1; \
	else echo "kt_kernel is not installed: no comparison with it"; fi

clean: ## Remove build trees and caches
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
