# make test   the tests: some minutes        make test-slow   the slow ones, which CI runs too
# make lint   style, types, C++ format
# make demo   the whole chain on digits      make clean  everything that make made
# make bench  all of asv: hours              make bench-quick  that every benchmark runs
# make sanitize  the tests of the C++ code, on a build with sanitizers
# make check-triton  that every Triton kernel compiles for GPUs, with both versions of triton
#
# Each of them first makes .venv: needs Python 3.11 or later and a C++ compiler, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
KRRST := $(BIN)/krrst
SOURCES := $(shell find csrc -type f)
CPP := $(filter %.cpp %.h %.inc %.cu %.cuh,$(SOURCES)) $(wildcard tests/*.cpp)
# torch's CPU builds bring no triton; the interpreter that tests the kernels without a GPU is in it.
TRITON := triton==3.9.0
# The one that comes with torch 2.11 for CUDA 13; the two compile the same kernel differently.
TRITON_OF_CUDA := triton==3.6.0

# Threads that wait by spinning take the cores from those that compute as soon as a machine is shared:
# a step of some milliseconds then takes seconds.
export OMP_WAIT_POLICY ?= PASSIVE

.DELETE_ON_ERROR:
.PHONY: test test-slow demo lint sanitize check-triton clean install bench bench-quick

install: .venv/.built

# Two processes with one thread each: threads of one process wait for each other.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" -n 2 --dist worksteal --durations=10

# Then the tests of the C++ operators again, with two threads.
test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow -n 2 --dist worksteal --durations=10
	$(BIN)/pytest -q $(addprefix tests/,test_library.py test_batched_ops.py test_gram.py test_krr_batched.py)

demo: install
	rm -rf demo
	$(KRRST) prepare digits demo/digits --run digits
	$(KRRST) target --run digits --store demo/digits --out demo/target
	$(KRRST) distill --run digits --store demo/digits --target demo/target --out demo/run
	$(KRRST) evaluate demo/run --run digits --store demo/digits
	$(KRRST) report demo/run

bench: install
	$(BIN)/asv machine --yes
	$(BIN)/asv run -E existing --set-commit-hash "$$(git rev-parse HEAD)"

# A small shape of every suite, and every measurement of one; asv keeps what it knows of the machine
# in HOME.
SMALLEST := (m=30|m=100|n=10|n=256|episodes=256|i=1024|b=256, size=8|name='digits'
SMALLEST := $(SMALLEST)|n=1000, p=10|m=1000, p=10, d=2048|n=4096, i=25)[,)]
bench-quick: install
	$(BIN)/asv check -E existing
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && export HOME=$$home \
		&& $(BIN)/asv machine --yes > $$home/log && echo "asv run --quick" \
		&& { $(BIN)/asv run --quick --dry-run -E existing --show-stderr \
			--bench "track_error\(\w+\($(SMALLEST)" \
			--bench "RidgeSolve\.\w+\(Shape\(m=30.*'torch', 'float32'" > $$home/log 2>&1 \
		|| { tail -n 60 $$home/log; exit 1; }; } \
		&& awk '/time_call|track_/ { n++ } END { print n + 0, "benchmarks ran" }' $$home/log

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

sanitize: install
	.ci/sanitize

check-triton: install .venv/triton-of-cuda/.installed
	$(BIN)/python tools/check_triton.py
	PYTHONPATH=.venv/triton-of-cuda $(BIN)/python tools/check_triton.py

.venv/triton-of-cuda/.installed: .venv/.torch
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) $(TRITON_OF_CUDA) < /dev/null
	@touch $@

clean:
	rm -rf .venv build dist demo *.egg-info krrst_fast/*.so

# pip's editable install is never incremental, so each step has a stamp and does only its own part.
.venv/.torch: constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"make: needs Python 3.11 or later, found {sys.version}; set PYTHON=")'
	"$(PYTHON)" -m venv .venv
	@echo "Installing torch and the build tools: this may take some minutes."
	$(PIP) install -c constraints.txt torch==2.13.0 numpy setuptools wheel pybind11 ninja < /dev/null
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) install $(TRITON) < /dev/null
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml
	@echo "Installing krrst_fast and the packages it uses."
	KRRST_FAST_BUILD=0 $(PIP) install -c constraints.txt --no-build-isolation \
		-e '.[cli,data,encoders,onnx,parquet,report,tensorboard,wandb,test,bench,dev]' < /dev/null
	@touch $@

.venv/.built: .venv/.installed setup.py $(SOURCES)
	@echo "Building the extension; the compiler's words are in .venv/build.log."
	@KRRST_FAST_BUILD=1 $(BIN)/python setup.py build_ext --inplace > .venv/build.log 2>&1 < /dev/null \
		|| { tail -n 40 .venv/build.log; exit 1; }
	@touch $@
