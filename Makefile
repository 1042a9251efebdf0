# `make demo` and `make test` are all the set-up there is; CI runs `make test` and `make check`.
# Each installs what it needs into .venv once; a stamp file makes the next run start at once.

VENV := .venv
BIN := $(VENV)/bin
LOWEST := build/lowest
CLIENTS := build/clients
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# The versions that everybody develops with; `make LOCK=/dev/null test` takes the newest instead.
LOCK := requirements-dev.lock
PIP := $(BIN)/python $(PIP_INSTALL) --constraint $(LOCK)

.PHONY: demo test check coverage lowest lock fuzz mutants metal streaming bits docs golden clients page clean

demo: $(VENV)/.installed
	$(BIN)/mlx-gptoss demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sh scripts/typecheck.sh $(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python scripts/make_cli_docs.py --check
	$(BIN)/python scripts/make_results.py --check
	$(BIN)/python scripts/check_dist.py build/dist
	if [ -x tests/page/node_modules/.bin/tsc ]; then tests/page/node_modules/.bin/tsc -p tests/page/tsconfig.json; fi

# The suite with every line and branch counted that it runs; fails below the floor in pyproject.toml.
coverage: $(VENV)/.installed-dev
	rm -rf build/coverage
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The suite on the oldest versions that pyproject.toml allows, in an environment of its own.
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest

# Write requirements-dev.lock again with the newest versions that pyproject.toml allows.
lock: $(VENV)/.installed-dev
	sh scripts/lock.sh $(BIN)/uv $(LOCK)

# The parser of the chat format on 100,000 token sequences; the suite runs 3,000.
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.support.fuzz_harmony --count 100000

# Flip comparisons and shift numbers at 400 places, one at a time: do the tests notice? See docs/mutants.md.
mutants: $(VENV)/.installed-dev
	$(BIN)/python -m scripts.mutants $(MUTANTS)

# The Metal kernels on many more shapes than the suite tries, and with slips, run by the emulator of tests/metal.
metal: $(VENV)/.installed-test
	$(BIN)/python -m tests.metal.parity
	$(BIN)/python -m tests.metal.mutants --docs docs/kernels.md

# A random 20b of 13.8 GB, and its 4-bit conversion, under hard limits on memory (Linux, as root).
STREAMED := build/streamed
streaming: $(VENV)/.installed-test
	test -d $(STREAMED)/20b || $(BIN)/python -m tests.support.checkpoints --shape 20b --out $(STREAMED)/20b
	test -d $(STREAMED)/q4 || $(BIN)/mlx-gptoss convert $(STREAMED)/20b $(STREAMED)/q4 --fast --no-tokenizer
	$(BIN)/python -m benchmarks.streaming fit $(STREAMED)/20b --limit 9GB
	$(BIN)/python -m benchmarks.streaming fit $(STREAMED)/q4 --limit 6GB
	$(BIN)/python -m benchmarks.streaming fit $(STREAMED)/q4 --limit 4GB

# Streamed logits against resident ones, bit by bit, on four layers of each true shape (9.3 GB at a time).
bits: $(VENV)/.installed-test
	for shape in 20b 120b; do \
		$(BIN)/python -m tests.support.checkpoints --shape $$shape --layers 4 --out $(STREAMED)/$$shape-4 && \
		$(BIN)/python -m benchmarks.streaming same $(STREAMED)/$$shape-4 && rm -r $(STREAMED)/$$shape-4 || exit 1; \
	done

# A model over several ranks of this machine: against one process, what crosses the wire, and 100 faults.
several-macs: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.several_macs requests
	$(BIN)/python -m benchmarks.several_macs tensor
	$(BIN)/python -m benchmarks.several_macs wire
	$(BIN)/python -m benchmarks.faults

# Write docs/cli.md again from the commands' own help, and the page and schema of docs/results.
docs: $(VENV)/.installed
	$(BIN)/python scripts/make_cli_docs.py
	$(BIN)/python scripts/make_results.py

# Compute tests/support/golden again; the only thing here that needs PyTorch.
golden: $(VENV)/.installed-test
	$(PIP) -e '.[train]'
	$(BIN)/python -m tests.support.make_golden

# Fetch the clients that tests/server/test_fetched_clients.py tries, for node and for Python, and try them.
clients: $(VENV)/.installed-test $(CLIENTS)/.installed
	npm install --prefix tests/server/clients --no-audit --no-fund
	$(BIN)/python -m pytest tests/server/test_clients.py tests/server/test_fetched_clients.py

# Fetch what the page's tests use of node's packages, and run them in a browser (chromium, chromedriver).
page: $(VENV)/.installed-test
	npm install --prefix tests/page --no-audit --no-fund
	PAGE_ACTIONS=200 $(BIN)/python -m pytest tests/page tests/markdown

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	sh scripts/make_venv.sh $(VENV)

$(VENV)/.installed: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

# Python 3.11 first: the oldest versions have no wheels for newer ones.
$(LOWEST)/.installed: pyproject.toml scripts/lowest.py
	PYTHON="$${PYTHON:-python3.11}" sh scripts/make_venv.sh $(LOWEST)
	$(LOWEST)/bin/python scripts/lowest.py test > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python $(PIP_INSTALL) --constraint $(LOWEST)/constraints.txt -e '.[test]'
	@touch $@

$(CLIENTS)/.installed: tests/server/clients/requirements.txt
	sh scripts/make_venv.sh $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP_INSTALL) -r tests/server/clients/requirements.txt
	@touch $@
