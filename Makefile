# Everything runs in a virtual environment of its own, .venv, which each target makes if it is missing.
#
#   make demo    what it does, in a minute: a simulated guest, then a real Linux kernel if the lab is there
#   make test    builds, makes the lab if it is missing, runs every test
#   make lint    ruff, mypy, import rules, stub check
#   make bench   the benchmarks, with a report in build/bench/report.md
#   make fuzz    malformed input under sanitizers (COUNT=100000)
#   make lab     the real guests: a Debian tree with User Mode Linux and QEMU
#   make build   rebuilds the extension after a change     make wheel    a wheel in dist/
#
# Where the package mirror is a frozen copy, whose release file has expired, first:
#   export VSPORT_LAB_APTOPT='Acquire::Check-Valid-Until "false"'

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COUNT ?= 100000
SEED ?= 1
SANITIZED := build/sanitize
BENCH := build/bench
export VSPORT_LAB_APTOPT

.PHONY: build clean demo fuzz lab bench lint test tools wheel

build: $(VENV)/.built

# What setting up needs is looked for first, so that the message is ours and not a compiler's.
tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "make: needs Python 3.11 or later as '$(PYTHON)' (or say: make PYTHON=python3.12 ...)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "make: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null \
		|| { echo "make: needs a C compiler; on Debian: apt-get install gcc libc6-dev" >&2; exit 1; }
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| { echo "make: needs Python's C headers; on Debian: apt-get install python3-dev" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | tools
	@echo "making a virtual environment in $(VENV), with what building and testing need"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) --group dev
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard vsport/*.pyx vsport/*.pxd vsport/ring/*.pxi vsport/*.h)
	@echo "building vsport"
	@$(PIP) --quiet --no-build-isolation --editable .  # Twice quiet: setuptools warns of every editable package.
	@touch $@

lab: build
	$(BIN)/vsport lab build

demo: build
	@$(BIN)/vsport demo
	@if [ -d "$$($(BIN)/vsport lab path)" ]; then $(BIN)/vsport demo --guest uml; \
		else echo "'make lab' makes real Linux guests; then 'make demo' shows this on one, too."; fi

test: build lab
	$(BIN)/pytest

# A report is made also of a run in which something failed; without measuring (--benchmark-disable) there is none.
bench: build
	@mkdir -p $(BENCH)
	@rm -f $(BENCH)/*
	@$(BIN)/pytest benchmarks --benchmark-columns=min,median,max --benchmark-json=$(BENCH)/results.json $(BENCH_FLAGS); \
		status=$$?; \
		if [ -e $(BENCH)/results.json ]; then $(BIN)/python benchmarks/report.py $(BENCH)/results.json; fi; \
		exit $$status

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest vsport._ring vsport._poll
	$(BIN)/lint-imports

# The extension with AddressSanitizer and UBSan in a tree of its own; leaks are the interpreter's own at exit.
fuzz: build
	VSPORT_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)/tmp --build-lib $(SANITIZED)
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc PYTHONPATH=$(SANITIZED) \
		$(BIN)/python tests/fuzz.py --sanitized --count $(COUNT) --seed $(SEED)

wheel: build
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist vsport/_*.c vsport/_*.so *.egg-info
