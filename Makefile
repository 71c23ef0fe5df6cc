# Two commands matter: `make demo` and `make test`. Both set up .venv first. Nothing but Python >= 3.11 and make is needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test fast env lint clean

demo: env
	$(BIN)/clipmill demo

# The whole suite; `make fast` leaves out what is marked slow. PROCESSES=0 runs it in one process, 2 a file in each.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: env
	$(PYTEST)

fast: env
	$(PYTEST) -m "not slow"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

env: $(READY)

# The tested versions are in constraints.txt; `make env CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= -c constraints.txt
$(READY): pyproject.toml constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipmill needs Python 3.11 or newer; say which with: make PYTHON=python3.12 env")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(CONSTRAINTS) --override overrides.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info demo
