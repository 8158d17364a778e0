# Two commands on a fresh machine with Python >= 3.11:
#
#   make quickstart    virtual environment, install, train dense and sparse networks, table and plot in results/quickstart
#   make test          virtual environment, install what the tests need, run them
#
# PYTHON=python3.12 takes another Python, JAX=0.11.2 another JAX than the newest that pip finds for that Python. Every
# combination has a virtual environment of its own; repeated calls install nothing unless setup.py has changed.

PYTHON ?= python3
JAX ?=
WORKERS ?= 2

# A name such as python3.12 may be a pyenv shim of a version that is not active: then take that version itself.
PY := $(shell $(PYTHON) -c '' 2>/dev/null && echo $(PYTHON) || ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$(PYTHON) 2>/dev/null | tail -1)
VERSION := $(if $(PY),$(shell $(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 11) else "")' 2>/dev/null))
VENV := .venv-$(VERSION)$(if $(JAX),-jax$(JAX))
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
# What must have JAX's version, if it is installed at all.
PINNED := $(if $(JAX),$(addsuffix ==$(JAX),jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt))

.PHONY: quickstart test test-laws lint clean

quickstart: $(VENV)/.installed-quickstart
	$(RUN) experiments/quickstart.py

test: $(VENV)/.installed-test
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not laws" tests jaxsparse

# Every algorithm with every optimizer, of which `make test` runs a selection; then that selection as XLA compiles for users.
# docs/decisions.md says when it last passed.
test-laws: $(VENV)/.installed-test
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m laws tests
	JAXSPARSE_OPTIMISED_TESTS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not laws" tests/test_laws.py

lint: $(VENV)/.installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv-* results build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(VERSION)" || { echo "PYTHON=$(PYTHON) does not run, or is older than Python 3.11; name another with make PYTHON=..." >&2; exit 1; }
	@$(PY) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PY) cannot make virtual environments (Debian, Ubuntu: apt-get install python$(VERSION)-venv)." >&2; exit 1; }

$(VENV)/.installed-%: setup.py | $(VENV)/bin/python
	@echo "Installing jaxsparse[$*] into $(VENV) (a minute or so, the first time) ..."
	@printf '%s\n' $(PINNED) >$(VENV)/constraints.txt
	@$(INSTALL) -e ".[$*]" --constraint $(VENV)/constraints.txt
	@touch $@
