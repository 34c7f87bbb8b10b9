# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.PHONY: demo test lint clean

demo: $(READY)  ## train a base, grow it, train the target and scratch, report the speed-up
	$(VENV)/bin/outgrow demo $(ARGS)

test: $(READY)  ## the test suite, on every core up to eight
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(READY)  ## format, lint, types of the pure core
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_BUILD_CONSTRAINT=constraints.txt $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:  ## forget the environment; runs stay
	rm -rf $(VENV)
