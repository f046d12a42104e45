# Python 3.11 or newer, and a package index for the first `make`; nothing else.
PYTHON ?= python3
VENV ?= .venv
CLIENTS ?= 5
# Of pyproject.toml, separated by commas. A machine of a deployment needs none: make env EXTRAS=
EXTRAS ?= dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env lock demo deploy-demo test test-deploy lint docs clean

env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

# The versions that are installed here, for all machines of a deployment.
lock: $(STAMP)
	(echo "# Versions that were tested together; written by: make lock"; $(BIN)/python -m pip freeze --exclude-editable) >$@.new
	mv $@.new deploy/constraints.txt

demo: $(STAMP)
	$(BIN)/fedmitr demo --clients $(CLIENTS)

deploy-demo: $(STAMP)
	$(BIN)/python deploy/demo.py

COVERED := --cov --cov-report=term:skip-covered --cov-fail-under=97

# Two processes: tests are on one thread each, and those that start Flower wait more than they compute. One that dies
# is not replaced, for which pytest-xdist would wait without end.
# COVERAGE=1 counts lines, which takes a third longer, and wants 97 % of them.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart=0 $(if $(COVERAGE),$(COVERED))

# Processes that are killed, disks that fill and the like: an hour on a busy machine; ONLY=smoke is the short form.
ONLY ?= deploy
test-deploy: $(STAMP)
	$(BIN)/python -m pytest -v -m "deploy and $(ONLY)" tests/test_deploy.py tests/test_flwr_run.py

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# A site of docs/ in site/.
docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

clean:
	rm -rf $(VENV) .flwr .coverage .hypothesis .pytest_cache .mypy_cache .ruff_cache dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
