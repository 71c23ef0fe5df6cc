# `make demo` and `make test` set up .venv first. Only Python >= 3.11 and make are needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test fast env lint clean

demo: env
	$(BIN)/clipmill demo

# The whole suite; `make fast` skips tests marked slow. PROCESSES=N runs N files at a time, 0 runs all in one process.
PROCESSES ?= 2
# A test process that dies is not replaced: with --dist loadfile, pytest-xdist 3.8 would wait for ever for its files.
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: env
	$(PYTEST)

fast: env
	$(PYTEST) -m "not slow"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

env: $(READY)

# constraints.txt pins the tested versions; `make env CONSTRAINTS=` installs the newest that pyproject.toml allows.
CONSTRAINTS ?= -c constraints.txt
$(READY): pyproject.toml constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipmill needs Python 3.11 or newer; say which with: make PYTHON=python3.12 env")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(CONSTRAINTS) --override overrides.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info demo
