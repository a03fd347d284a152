# Two commands on a fresh machine with Python 3.11, 3.12 or 3.13: `make train` and `make test`.
# ARGS are passed on: `make train ARGS="model=tiny seed=1"`, `make test ARGS="-k optimizer"`.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: train test test-fast report report-quick lint types format clean

train: .venv/installed
	$(RUN) src/train.py --config-name=pattern_search_train $(ARGS)

# a process per core; each begins with its share of the tests in order, so that what a file shares is made once
TEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

test: .venv/installed
	$(TEST) $(ARGS)

test-fast: .venv/installed
	$(TEST) -m "not slow" $(ARGS)

# every contender on every task, about four hours on two cores; stopped, it goes on where it was
report: .venv/installed
	$(RUN) src/report.py compare report/full.yaml $(ARGS)

# three tasks, one seed, seven minutes
report-quick: .venv/installed
	$(RUN) src/report.py compare report/quick.yaml $(ARGS)

lint: types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: .venv/installed
	$(RUN) -m mypy

format: .venv/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, and this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
