# Everything is made in .venv from the package index; nothing else is downloaded. What compiles for
# accelerators that are not there has an environment of its own, .venv-aot, and so have what needs
# torch, .venv-peft, the tools that make GPTQ files, .venv-gptq, llama.cpp, .venv-llama, what drives
# the server's page in a browser, .venv-page, clients of the server, .venv-clients, Ray, .venv-ray,
# and what builds the documentation, .venv-docs.
PYTHON ?= python3
VENV ?= .venv
AOT_VENV ?= .venv-aot
PEFT_VENV ?= .venv-peft
GPTQ_VENV ?= .venv-gptq
LLAMA_VENV ?= .venv-llama
PAGE_VENV ?= .venv-page
CLIENTS_VENV ?= .venv-clients
RAY_VENV ?= .venv-ray
DOCS_VENV ?= .venv-docs
WORKERS ?= 2
PYTEST_ARGS ?= -m 'not slow and not release'
SLOW_ARGS ?= -m slow
AOT_ARGS ?=
PART ?= 1 2 3 4 5 6 7
PROMPT ?= The whale

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
AOT_STAMP := $(AOT_VENV)/.installed
PEFT_STAMP := $(PEFT_VENV)/.installed
GPTQ_STAMP := $(GPTQ_VENV)/.installed
LLAMA_STAMP := $(LLAMA_VENV)/.installed
PAGE_STAMP := $(PAGE_VENV)/.installed
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
RAY_STAMP := $(RAY_VENV)/.installed
DOCS_STAMP := $(DOCS_VENV)/.installed
LLAMA_SOURCE := $(LLAMA_VENV)/llama_cpp_python-0.3.36

export JAX_PLATFORMS ?= cpu
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help venv lint pytest test test-slow test-all test-aot test-peft test-gptq test-llama test-page test-clients test-ray aot-smoke device demo demo-train docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 chooses the interpreter, WORKERS=2 the test processes."

venv: $(STAMP) ## create or update the environment in .venv

$(STAMP): pyproject.toml
	@echo "$(VENV) gets the package with what training and the tests need: 2 minutes, 1.6 GB in all"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# What the package itself needs, and nothing for training or tests, which `make venv` adds.
$(DEMO_STAMP): pyproject.toml
	@echo "$(VENV) gets the package with what it needs itself: 2 minutes, 0.8 GB"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(AOT_STAMP): pyproject.toml
	test -x $(AOT_VENV)/bin/python || $(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[aot]'
	touch $@

$(PEFT_STAMP): pyproject.toml
	test -x $(PEFT_VENV)/bin/python || $(PYTHON) -m venv $(PEFT_VENV)
	$(PEFT_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[peft]'
	touch $@

# Both tools ask for packages that their layers do not need, and AutoGPTQ for an old transformers,
# so they come alone. AutoGPTQ has wheels up to Python 3.11, and is built without CUDA elsewhere.
$(GPTQ_STAMP): pyproject.toml
	test -x $(GPTQ_VENV)/bin/python || $(PYTHON) -m venv $(GPTQ_VENV)
	$(GPTQ_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[gptq]'
	BUILD_CUDA_EXT=0 $(GPTQ_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		auto-gptq==0.7.1 gptqmodel==7.7.0
	touch $@

# It is compiled, which takes half an hour on two cores. Its archive has the converter, too.
$(LLAMA_STAMP): pyproject.toml
	test -x $(LLAMA_VENV)/bin/python || $(PYTHON) -m venv $(LLAMA_VENV)
	$(LLAMA_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[llama]'
	$(LLAMA_VENV)/bin/pip download --quiet --disable-pip-version-check --dest $(LLAMA_VENV) --no-deps \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36
	tar -xzf $(LLAMA_SOURCE).tar.gz -C $(LLAMA_VENV)
	$(LLAMA_VENV)/bin/pip install --quiet --disable-pip-version-check $(LLAMA_SOURCE).tar.gz
	touch $@

# axe-core is found beside the packages; without npm its tests are skipped.
$(PAGE_STAMP): pyproject.toml
	test -x $(PAGE_VENV)/bin/python || $(PYTHON) -m venv $(PAGE_VENV)
	$(PAGE_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[page]'
	! type npm >/dev/null 2>&1 || npm install --silent --no-save --prefix $(PAGE_VENV) axe-core@4.14.1
	touch $@

$(CLIENTS_STAMP): pyproject.toml
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[clients]'
	touch $@

$(RAY_STAMP): pyproject.toml
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[ray]'
	touch $@

$(DOCS_STAMP): docs/requirements.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

lint: venv ## formatting, lint, types, and the order of the rooms
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/pyright

pytest: venv ## the tests alone; PYTEST_ARGS="-k rope" for a part of them
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test: lint ## all checks and the quick tests, on eight virtual CPU devices; kernels compiled
	$(MAKE) --no-print-directory pytest
	$(MAKE) --no-print-directory aot-smoke

test-slow: venv ## what `make test` leaves out: more meshes, more kills, notebooks, learning
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(MAKE) --no-print-directory pytest PYTEST_ARGS="$(SLOW_ARGS)"

test-all: test test-slow test-aot test-peft test-gptq test-page test-clients test-ray ## every test there is, but for test-llama

test-aot: $(AOT_STAMP) ## kernels compiled for all targets, sizes and lengths, and what they cost
	$(AOT_VENV)/bin/python -m pytest -n $(WORKERS) $(AOT_ARGS) tests/aot

test-peft: $(PEFT_STAMP) ## adapters in PEFT, and Qwen2 folders in transformers
	$(PEFT_VENV)/bin/python -m pytest -n $(WORKERS) tests/peft

test-gptq: $(GPTQ_STAMP) ## what we write in AutoGPTQ and GPTQModel
	$(GPTQ_VENV)/bin/python -m pytest tests/gptq_tools

test-llama: $(LLAMA_STAMP) ## a quantised model through llama.cpp's converter, and in llama.cpp
	LLAMA_CPP=$(LLAMA_SOURCE)/vendor/llama.cpp $(LLAMA_VENV)/bin/python -m pytest tests/llama

test-page: $(PAGE_STAMP) ## the server's page in Chromium, which `apt-get install chromium` brings
	$(PAGE_VENV)/bin/python -m pytest -rs tests/page

test-clients: venv $(CLIENTS_STAMP) ## the server under the openai, langchain and smolagents packages
	SERVER_PYTHON=$(BIN)/python $(CLIENTS_VENV)/bin/python -m pytest --confcutdir=tests/clients tests/clients

test-ray: $(RAY_STAMP) ## replicas behind Ray Serve, of which one is killed under load
	$(RAY_VENV)/bin/python -m pytest -s tests/replicas

aot-smoke: $(AOT_STAMP) ## one shape of each kernel and target
	$(AOT_VENV)/bin/python -m pytest -n $(WORKERS) -m smoke tests/aot

# Without .venv and with whatever accelerator there is: jax is the machine's own.
device: ## measure the accelerator here, in seven parts of five minutes (PART=2 for one)
	env -u JAX_PLATFORMS $(PYTHON) benchmarks/device.py --part $(PART) $(DEVICE_ARGS)

# An environment for the tests has what the demo needs, too.
demo: $(or $(wildcard $(STAMP)),$(DEMO_STAMP)) ## convert the small model of examples/moby_dick and let it write
	rm -rf demo/ckpt
	$(BIN)/python convert/from_hf.py examples/moby_dick/model demo/ckpt --verify
	$(BIN)/python -m qwen_jax.generate --ckpt demo/ckpt --prompt "$(PROMPT)" --max-new-tokens 40

demo-train: venv ## make that model again from its text, in some ten minutes
	PYTHON=$(BIN)/python bash examples/moby_dick/train.sh demo-train

docs: $(DOCS_STAMP) ## the documentation site, in site/; fails at a broken link or anchor
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

format: venv ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what these targets made
	rm -rf .venv .venv-newest .venv-aot .venv-peft .venv-gptq .venv-llama
	rm -rf .venv-page .venv-clients .venv-ray .venv-docs
	rm -rf .cache .hypothesis .pytest_cache .ruff_cache
	rm -rf build demo demo-train site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
