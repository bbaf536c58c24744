# make demo   both bundled checkpoints, from PyTorch to generated text
# make test   the whole suite
# make lint   ruff and mypy
# Each sets up .venv first; PYTHON=python3.12 chooses the interpreter. Where pip's torch is the CUDA build (gigabytes),
# TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' asks for the small one.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Half of the time would go into compiling modules that nobody imports; what is imported is compiled then, and kept.
INSTALL := $(PIP) install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
CLI := $(BIN)/mamba-deploy
DEMOS := tiny-mamba tiny-mamba2
PACKAGES := exporters plugins runtime

.PHONY: venv demo test lint types clean $(DEMOS:%=demo-%)
.NOTPARALLEL:

venv: $(VENV)/.installed-test

$(VENV)/.installed-test: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "\nhint: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(DEMOS:%=demo-%)

$(DEMOS:%=demo-%): demo-%: venv
	$(CLI) export samples/$* out/$* --force
	$(CLI) verify out/$*
	$(CLI) generate out/$* -p "def main(" -n 200 --temperature 0.7 --top-p 0.95 --seed 3
	@echo

test: venv
	$(BIN)/python -m pytest -q -rfEs -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

# mypy sees the packages as they are imported: links below one folder, real paths in its messages.
types:
	@rm -rf build/types && mkdir -p build/types/mamba_deploy
	@ln -s $(CURDIR)/mamba_deploy/* $(PACKAGES:%=$(CURDIR)/%) build/types/mamba_deploy/
	@cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		-p mamba_deploy | sed -E 's#^mamba_deploy/(exporters|plugins|runtime)/#\1/#'

clean:
	rm -rf build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
