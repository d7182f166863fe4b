# Everything that a fresh machine with git, make and Python needs. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA GPU takes the newest CUDA build of torch; all others the small CPU build.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
EXTRA := $(if $(GPU),gpu,cpu)
CONSTRAINTS := $(if $(GPU),,-c constraints.txt)
# Small models are fastest on one thread, and no test may reach for a model hub.
RUN := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# A file of tests stays in one process, with the servers that it started.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile

.PHONY: help install quickstart test check lint layout types wheel clean
help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 14

$(VENV)/installed-$(EXTRA): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ($(EXTRA)): about a minute, or as long as the downloads take"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[$(EXTRA)]'
	touch $@

$(VENV)/installed-$(EXTRA)-test: $(VENV)/installed-$(EXTRA)
	@echo "installing all extras and the test tools: two minutes, or as long as the downloads take"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[$(EXTRA),test]'
	touch $@

.PHONY: install-test
install: $(VENV)/installed-$(EXTRA)  ## virtual environment with the package, editable
install-test: $(VENV)/installed-$(EXTRA)-test

quickstart: install  ## build TinyWiki, train a small search agent on it, write runs/quickstart/report.html
	$(RUN) $(BIN)/agentgym-ig quickstart --out runs/quickstart

test: install-test  ## all tests, side by side on the machine's cores
	$(RUN) $(BIN)/python -m pytest $(PARALLEL)

check: lint types test  ## lint, strict types, and all tests with the layout guards

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A tree of links in which the import name and the folders agree, for tools that find packages by folder.
build/types: install-test
	rm -rf build/types && mkdir -p build/types/agentgym_ig
	ln -s $(CURDIR)/agentgym_ig/* $(CURDIR)/envs $(CURDIR)/indexes $(CURDIR)/trainers build/types/agentgym_ig/

types: build/types
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml -p agentgym_ig | tee ../mypy.txt
	$(BIN)/python .ci/check_types.py build/mypy.txt
	MYPYPATH=build/types $(BIN)/mypy --explicit-package-bases tests benchmarks data_scripts .ci/check_wheel.py

wheel: install-test  ## build the wheel and try it in a clean virtual environment
	$(BIN)/python .ci/check_wheel.py

clean:  ## remove the virtual environment and all that was built
	rm -rf $(VENV) build dist *.egg-info runs
.PHONY: build/types
