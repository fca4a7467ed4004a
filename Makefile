# make         virtual environment in .venv, package installed, with llama.cpp's programs (one native build, of the fork)
# make demo    a question about a long text, answered with F16 and with xquant; MODEL=path.gguf for any model
# make test    the whole test suite, and what a newcomer does with the wheel that was installed
# make test-arm  the kernels for 64-bit ARM, cross-built and run under qemu
# make asan    the tests of what takes input from outside, with AddressSanitizer and UndefinedBehaviorSanitizer (clang)
# make fuzz    TARGET=metadata, state, codec, verbs or nodes for SECONDS=60 with libFuzzer and both sanitizers (clang)
# make llama VERSION=x.y.z (or SOURCE=folder)  tries another llama-cpp-python: do our insertions hold, the oracle tests
# make fixes   writes docs/llama-cpp-fixes.md from native/llama/fixes.py
# make docs    the site of README, docs/ and docstrings, in build/site
# make wheels  wheels for Linux in dist, built with Zig; TARGET=name for one, also for Windows (tools/wheels.py lists them)
# make test-wheels  installs the wheels in dist into environments of their own, generates and serves
# make server-tests  llama.cpp's own tests of llama-server with F16 and with xquant
# make release  source archive, wheels, their tests and hashes, and the tag (CONTRIBUTING.md)
# make lint    formatting, lint and types, as pre-commit runs them; needs Python alone: it builds nothing
# make clean   removes .venv, .lint, .docs, .wheels, .server-tests and build

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
BUILT  := build/built
# Changes to these build the package again; an unchanged tree builds nothing.
SOURCES := $(shell find native xquant_gguf xquant_gguf_hook tools -type f -not -path '*/lib/*' -not -path '*/__pycache__/*') \
           CMakeLists.txt pyproject.toml
MODEL  ?=
# Tests by two workers and more: a worker that has nothing left takes half of what another still has to do.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: all demo test test-arm asan fuzz llama fixes docs wheels test-wheels server-tests release lint clean
all: $(VENV)/installed

$(VENV)/created:
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, apt-get install python3-venv"; exit 1; }
	touch $@

# LLAMA_BUILD=OFF: of llama-cpp-python only the Python part is installed, so that llama.cpp is compiled once, by us.
# All comes from wheel files, which tests/wheels installs again where nothing else is.
$(VENV)/installed: $(VENV)/created $(SOURCES)
	@rm -rf $(BUILT); export CMAKE_ARGS="-DLLAMA_BUILD=OFF -DXQUANT_PROGRAMS=ON $(CMAKE_ARGS)"; \
	( $(PIP) wheel -v -w $(BUILT) . && $(PIP) install --force-reinstall --no-deps $(BUILT)/xquant_gguf-*.whl && \
	  $(PIP) install --find-links $(BUILT) "$$(echo $(BUILT)/xquant_gguf-*.whl)[test]" ) \
	  > $(VENV)/install.log 2>&1 & pid=$$!; echo "installing (log: $(VENV)/install.log)"; \
	  while kill -0 $$pid 2>/dev/null; do sleep 5; \
	    line=$$(grep -o '^ *\[[0-9]*/[0-9]*\]' $(VENV)/install.log | tail -n 1); \
	    [ -n "$$line" ] && printf '\r  native build %s ' "$$line"; done; echo; \
	  wait $$pid || { tail -n 40 $(VENV)/install.log; exit 1; }
	@touch $@

demo: all
	@$(BIN)/python tools/demo.py $(if $(MODEL),"$(MODEL)")

test: all
	XQUANT_WHEELS=$(BUILT) $(BIN)/pytest $(PARALLEL) --cov=xquant_gguf

test-arm: all
	XQUANT_AARCH64=required $(BIN)/pytest $(PARALLEL) tests/kernels -m arm

TARGET  ?= metadata
SECONDS ?= 60
asan: all
	PYTHON=$(BIN)/python tools/asan.sh

fuzz: all
	PYTHON=$(BIN)/python tests/fuzz/run.sh $(TARGET) $(SECONDS)

llama: all
	$(BIN)/python tools/try_llama.py $(if $(SOURCE),--source $(SOURCE),$(VERSION))

fixes:
	$(PYTHON) tools/list_fixes.py

# The tools of pyproject.toml's dependency groups, in environments of their own (pip 25.1 is the first to read groups).
LINT   := .lint
DOCS   := .docs
WHEELS := .wheels
SERVER := .server-tests
$(LINT)/ready $(DOCS)/ready $(WHEELS)/ready $(SERVER)/ready: .%/ready: pyproject.toml
	$(PYTHON) -m venv .$*
	.$*/bin/python -m pip install -q "pip>=25.1"
	.$*/bin/python -m pip install -q --group $*
	touch $@

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

wheels: $(WHEELS)/ready
	$(WHEELS)/bin/python tools/wheels.py $(if $(filter command line,$(origin TARGET)),$(TARGET))

test-wheels: all
	XQUANT_WHEELS=$(or $(XQUANT_WHEELS),dist) $(BIN)/pytest tests/wheels

server-tests: all $(SERVER)/ready
	PYTHONPATH=tests $(BIN)/python tools/server_tests.py --python $(SERVER)/bin/python \
	  $(if $(MODEL),--model "$(MODEL)") $(ARGS)

release: all $(WHEELS)/ready
	PYTEST=$(BIN)/pytest $(WHEELS)/bin/python tools/release.py

lint: $(LINT)/ready
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy
	for system in win32 darwin; do $(LINT)/bin/mypy --platform $$system xquant_gguf xquant_gguf_hook || exit 1; done
	$(LINT)/bin/clang-format --dry-run --Werror $$(git ls-files 'native/*.h' 'native/*.cpp' 'native/*.cu*' 'tests/*.h' 'tests/*.cpp')

clean:
	rm -rf $(VENV) $(LINT) $(DOCS) $(WHEELS) $(SERVER) build
