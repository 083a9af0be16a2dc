# make demo   the whole pipeline on the demo corpus, about five minutes on two CPU cores
# make test   lint and tests
# PYTHON=python3.12 make ...   another interpreter than python3 for the virtual environment

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test install clean-demo

# Touched after an installation that succeeded; a change of the requirements installs again.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

install: $(VENV)/installed

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest
