# Each target makes the virtual environment that it needs, and makes it anew where pyproject.toml or constraints.txt
# has changed.
#   PYTHON     the interpreter to make it with; else the first of CANDIDATES that is Python 3.11 or newer
#   PIP_FLAGS  more options for pip; on a machine without a GPU the small build of torch is
#              PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   ARGS       more arguments for pytest (make test) or the trainer (make train)

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed

CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
PROBE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
DEMO := runs/demo

# Where the interpreter has gone (the system's Python was replaced), what was installed for it has gone too.
$(if $(shell test -x $(BIN)/python || echo gone),$(shell rm -f $(CORE) $(DEV)))

.DELETE_ON_ERROR:
.PHONY: help install demo test check bench train

help:
	@echo "make install   the library and its command line, in $(VENV)"
	@echo "make demo      four papers' methods compared on the built-in model, with a report"
	@echo "make test      the tests"
	@echo "make check     ruff and mypy"
	@echo "make bench     the speed measurements in benchmarks/"
	@echo "make train     train the built-in model again"

$(BIN)/python:
	@for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
		if "$$candidate" -c "$(PROBE)" 2>/dev/null; then \
			echo "making $(VENV) with $$candidate"; \
			exec "$$candidate" -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "No Python 3.11 or newer with venv and pip among: $(or $(PYTHON),$(CANDIDATES))." >&2; \
	echo "Install one (on Debian also its python3-venv), or name it: make install PYTHON=/path/to/python3" >&2; \
	exit 1

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(CORE)
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(CORE)
	@echo "installed; try: $(BIN)/sightline --help"

demo: install
	$(BIN)/sightline bench --model picturebook-nano --benchmark pope --split adversarial \
		--methods none fastervlm:keep=0.25 vhr vista ritual --items 60 --out $(DEMO)
	$(BIN)/sightline report $(DEMO)

test: $(DEV)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: $(DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(CORE)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

train: $(CORE)
	$(BIN)/sightline train nano $(ARGS)
