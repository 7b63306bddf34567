# make             set up the environment, then the extraction demo: one artist and one object, three arms, pictures and scores
# make test        set up the environment, then the tests, two side by side (more: make test WORKERS=8)
# make reproduce   set up the environment, then every notebook but 00, by papermill, two steps side by side (more: WORKERS=8)
# make setup       set up the environment and nothing else
# make lab         set up the environment, then JupyterLab on the notebooks
# make site        set up the environment, then the site, in runs/site
# make lint        set up the environment, then ruff
# make clean-env   delete the environment (the next command sets it up again)
#
# The environment is .venv; it is set up once and again only when requirements.txt or pyproject.toml changed.
# It needs Python 3.11 or newer: another interpreter is chosen with, for example, make PYTHON3=python3.12

PYTHON3 ?= python3
WORKERS ?= 2
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := demo
.PHONY: demo test reproduce setup lab site lint clean-env

demo: $(STAMP)
	$(PYTHON) -m fx.demo

test: $(STAMP)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadgroup

reproduce: $(STAMP)
	$(PYTHON) -m fx.reproduce --scheduler local:$(WORKERS)

setup: $(STAMP)

lab: $(STAMP)
	$(PYTHON) -m jupyterlab notebooks

site: $(STAMP)
	$(PYTHON) -m fx.site

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean-env:
	rm -rf $(VENV)

IS_SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))

define CREATE
command -v $(PYTHON3) >/dev/null \
|| { echo "make: there is no program $(PYTHON3). Install Python 3.11 or newer, or name one: make PYTHON3=/path/to/python3" >&2; exit 1; }; \
$(PYTHON3) -c '$(IS_SUPPORTED)' \
|| { echo "make: $(PYTHON3) is $$($(PYTHON3) --version 2>&1), Python 3.11 or newer is needed. Name one: make PYTHON3=/path/to/python3" >&2; exit 1; }; \
$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null \
|| { echo "make: $(PYTHON3) cannot create virtual environments. Install its venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
echo "make: creating $(VENV) with $$($(PYTHON3) --version)"; $(PYTHON3) -m venv $(VENV)
endef

# The stamp is written last, so an interrupted or failed installation leaves none and the next command takes it up again.
# $(PYTHON) -m pip fails where there is no environment yet or where its creation was interrupted.
$(STAMP): requirements.txt pyproject.toml
	@rm -f $@
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { $(CREATE) ; }
	@$(PYTHON) -c '$(IS_SUPPORTED)' || { echo "make: $(VENV) holds an older Python than 3.11. Delete it with: make clean-env" >&2; exit 1; }
	$(PYTHON) -m pip install -r requirements.txt
	$(PYTHON) -m pip install --no-deps -e .
	@touch $@
