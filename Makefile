# `make help` lists the targets. PYTHON is the interpreter (of a virtual environment) to work with.

PYTHON ?= python3
JOBS ?= $(shell nproc)
# Python tests at once: most of their time is one thread's.
WORKERS ?= 2
# `make test PACKAGE=adapter`: the tests of tests/python/adapter and tests/cpp/adapter.
PACKAGE ?=
# Which tests of each instruction set: `long` ones with LENGTH=long.
LENGTH ?= not long
FUZZ_SECONDS ?= 300
SERVE_SECONDS ?= 300
PYTEST = $(PYTHON) -m pytest -n $(WORKERS)
# What the environment holds (cmake, ninja, ruff, mypy, clang-format) comes before the system's.
export PATH := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$(PATH)

CPP_FILES = $(shell find csrc tests/cpp bench -name '*.h' -o -name '*.cc')

.PHONY: help ci install-test-deps develop check check-long quick docs format format-check lint types \
        build-release build-asan build-tsan test test-cpp test-asan test-tsan test-python test-isa \
        test-browser page-picture serve-load bench bench-smoke fuzz clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

ci: ## Install all that the tests need and ktrt itself, then run everything (tools/test)
	tools/test

install-test-deps: ## System packages, a virtual environment if none is active, `pip install '.[test]'`
	tools/setup --test

develop: ## Rebuild and install ktrt alone, incrementally (needs scikit-build-core, pybind11, cmake, ninja)
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps --config-settings=build-dir=build/python .

check: ## Run every check, with a table of times at the end
	PYTHON="$(PYTHON)" tools/test --here

check-long: fuzz serve-load ## What takes long and rarely fails: `fuzz`, `serve-load`, and tests marked `long`
	$(PYTEST) --dist worksteal -m long
	$(MAKE) test-isa LENGTH=long

quick: format-check lint types ## Less than 3 minutes: what a change most likely breaks (tools/quick)
	PYTHON="$(PYTHON)" WORKERS=$(WORKERS) tools/quick

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

test: ## C++ and Python tests; PACKAGE=adapter: the folders of that name
ifeq ($(PACKAGE),)
test: test-cpp test-python
else
test:
	@[ -d tests/python/$(PACKAGE) ] || [ -d tests/cpp/$(PACKAGE) ] || { \
	  echo "no tests/python/$(PACKAGE), no tests/cpp/$(PACKAGE); there are:" $$(cd tests && ls -d */*/) >&2; exit 2; }
	@if [ -d tests/cpp/$(PACKAGE) ]; then set -x; cmake --preset release && \
	  cmake --build --preset release -j $(JOBS) --target ktrt_test_$(PACKAGE) && \
	  ctest --preset release -R '^$(PACKAGE)$$'; fi
	@if [ -d tests/python/$(PACKAGE) ]; then set -x; $(PYTEST) --dist worksteal tests/python/$(PACKAGE); fi
endif

build-release build-asan build-tsan: build-%:
	cmake --preset $* && cmake --build --preset $* -j $(JOBS)

test-cpp: build-release ## C++ tests, as users run the code
	ctest --preset release -j $(JOBS)

test-asan: build-asan ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	ctest --preset asan -j $(JOBS)

test-tsan: build-tsan ## C++ tests of everything with threads under ThreadSanitizer
	ctest --preset tsan -j $(JOBS)

test-python: ## Python tests (of the checkout's Python and the installed module)
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m 'not long' --durations=25

# Their files by name: collecting all tests imports for 15 s. Without avx_vnni, which has AVX2's kernels
# but for two formats.
test-isa: ## End-to-end Python tests on each instruction set below the machine's own
	@files=$$(grep -lr --include='test_*.py' 'pytest.mark.end_to_end' tests/python); \
	for isa in $$($(PYTHON) -c 'from ktrt import _core as c; \
	    order = ["portable", "avx2", "avx512", "amx"]; \
	    isa = c.detected_isa().replace("avx_vnni", "avx512"); print(*order[:order.index(isa)])'); do \
	  echo "KTRT_ISA=$$isa"; \
	  KTRT_ISA=$$isa $(PYTEST) --dist worksteal -q -m 'end_to_end and $(LENGTH)' $$files || exit 1; done

test-browser: ## The server's page in Chromium
	$(PYTEST) --dist worksteal -m browser

page-picture: ## docs/page.png, of the demo in Chromium
	$(PYTHON) tests/python/helpers/page_picture.py

serve-load: ## 64 streams of 4 models on a server of the demo for SERVE_SECONDS; every text compared
	$(PYTHON) bench/serve_load.py --streams 64 --adapters a,b,c,base --seconds $(SERVE_SECONDS)

fuzz: ## Damaged files and hostile calls with new seeds, FUZZ_SECONDS each; what fails is kept
	$(PYTHON) tests/fuzz/fuzz_files.py $(FUZZ_SECONDS)
	$(PYTHON) tests/fuzz/fuzz_calls.py $(FUZZ_SECONDS)

bench: build-release ## All micro-benchmarks (the comparison with kt_kernel: python bench/kt_kernel/compare.py)
	for b in build/release/bench/bench_*; do [ ! -x $$b ] || $$b || exit 1; done

bench-smoke: build-release ## Each micro-benchmark once, briefly, so that none rots
	for b in build/release/bench/bench_*; do [ ! -x $$b ] || $$b --benchmark_min_time=0.001 || exit 1; done
	$(PYTHON) bench/cpu_decode.py --quick --cache build/bench-cache
	$(PYTHON) bench/batch_curve.py --quick --many --cache build/bench-cache
	$(PYTHON) bench/one_row.py --quick --cache build/bench-cache
	$(PYTHON) bench/serve_load.py --quick --adapters a,base
	@if $(PYTHON) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("kt_kernel") is None)'; then \
	  $(PYTHON) bench/kt_kernel/compare.py --dtypes int8 --ranks 8 --qlens 1 --layers 1 --rounds 1; \
	else echo "kt_kernel is not installed: no comparison with it"; fi

clean: ## Remove build trees and caches
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
