# Each target's plain commands, for machines without make, stand in README.md.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
PORT ?= 8000
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

# Tools come from the lock, so that the strict build does not break when one of them moves on.
# The package's own dependencies come as ranges (newest torch), or with LOCKED=1 from the lock too.
LOCK := --constraint requirements.lock
ifneq ($(UV),)
INSTALL := uv pip install --python $(BIN)/python
else
INSTALL := $(BIN)/python -m pip install
endif
ifdef LOCKED
PACKAGE := $(INSTALL) --quiet --require-hashes --requirement requirements.lock \
  && $(INSTALL) --quiet --no-deps --editable .
else
PACKAGE := $(INSTALL) --quiet --editable .
endif

.PHONY: help book serve zip lab test test-peers bench peers mirror notebooks lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s ':'

$(VENV)/.made:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
ifeq ($(UV),)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" # the first that knows --group
endif
	@touch $@

# One stamp for each set of packages: a second run installs nothing unless pyproject.toml changed.
$(VENV)/.book: pyproject.toml | $(VENV)/.made
	$(INSTALL) --quiet --group book $(LOCK)
	@touch $@

$(VENV)/.lab: pyproject.toml | $(VENV)/.made
	$(INSTALL) --quiet --group lab $(LOCK)
	$(PACKAGE)
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(INSTALL) --quiet --group test $(LOCK)
	$(PACKAGE)
	@touch $@

$(VENV)/.peers: pyproject.toml | $(VENV)/.made
	$(INSTALL) --quiet --group peers --editable .
	@touch $@

book: $(VENV)/.book ## build the HTML, strictly, from the stored outputs
	$(BIN)/python tools/build_book.py

serve: book ## show the book on localhost:8000 (PORT=...)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

zip: book ## pack the book for reading offline: _build/conformer-step-by-step.zip
	$(BIN)/python -m zipfile -c _build/conformer-step-by-step.zip _build/html

lab: $(VENV)/.lab ## open the chapters in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=chapters

test: $(VENV)/.test ## check everything, or one chapter: make test CHAPTER=02
	$(BIN)/python tools/run_tests.py $(if $(CHAPTER),--chapter $(CHAPTER))

test-peers: peers ## compare with OpenMMLab's Conformer, in an environment of its own
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -q -rP tests/peers

bench: $(VENV)/.test peers ## measure what the README states: hours, on an idle machine
	$(BIN)/python benchmarks/reader_costs.py
	$(BIN)/python benchmarks/training.py || true # 1 if a bar is missed; stored runs are not repeated
	$(BIN)/python benchmarks/ablation.py # stored runs are not repeated
	$(BIN)/python benchmarks/robustness.py # with the runs of the line above
	$(BIN)/python benchmarks/cost.py
	$(PEERS)/bin/python benchmarks/against_mmpretrain.py --json benchmarks/results/against_mmpretrain.json

peers:
	@$(MAKE) --no-print-directory VENV=$(PEERS) $(PEERS)/.peers

mirror: $(VENV)/.test ## carry the package's text into the chapters' cells
	$(BIN)/python tools/mirror.py to-notebooks

notebooks: $(VENV)/.test ## run all chapters in place and clean them
	$(BIN)/python tools/notebooks.py run

lock: ## renew requirements.lock (needs uv)
	uv pip compile pyproject.toml --group lab --group test --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	  --upgrade --output-file requirements.lock

clean: ## remove what was built, keep .venv
	rm -rf _build
