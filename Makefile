# Everything that is set up here goes into .venv/, once; the system's Python stays as it is.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/done
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install --no-build-isolation

# The stubs of these tell what is for others; what is seen of them besides is for each other.
BUILT_OF_PARTS := tokenguard._fields tokenguard._heads tokenguard._refusal tokenguard.upstream._http \
    tokenguard.upstream._pool tokenguard.lane._lane

# An address only counts when it stands on make's command line: shells and hosts export a HOST or PORT of their own.
given = $(if $(findstring command,$(origin $1)),--$2 '$($1)')
ADDRESS = $(call given,HOST,host) $(call given,PORT,port) $(call given,WORKERS,workers)

# Extensions are compiled with cc, or what CC says, and not with the very compiler that built this Python.
export CC

# An environment knows its own path: in a tree that was moved or copied, it is made anew.
ifneq ($(file <$(DONE)/venv),$(CURDIR))
$(shell rm -rf $(DONE))
endif

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo serve test check bench build clean runtime

help: ## say what there is to do
	@sed -n 's/^\([a-z]*\):.* ## /\1 /p' Makefile | while read -r target what; do printf 'make %-7s %s\n' "$$target" "$$what"; done

demo: runtime ## set up, and serve on port 8000 with a built-in upstream that needs no key (HOST=, PORT=, WORKERS=)
	@exec $(BIN)/tokenguard demo $(ADDRESS)

serve: runtime ## set up, and serve with the real provider and the settings in .env (HOST=, PORT=, WORKERS=)
	@exec $(BIN)/tokenguard serve $(ADDRESS)

test: runtime $(DONE)/test ## set up with a real redis-server, and run all tests
	@tests/get-redis $(VENV)
	@echo "$(BIN)/python -m pytest (those that wait for servers beside the others)"
	@$(BIN)/python -m pytest tests/e2e >$(DONE)/e2e.log 2>&1 & servers=$$!; \
	    $(BIN)/python -m pytest tests/unit tests/integration; others=$$?; \
	    wait $$servers; servers=$$?; cat $(DONE)/e2e.log; exit $$((servers | others))

check: runtime $(DONE)/check ## lint, types, and whether the stubs match what is compiled
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tokenguard._bucket tokenguard._limit_fields tokenguard.providers._chat
	$(BIN)/python -m mypy.stubtest --ignore-missing-stub $(BUILT_OF_PARTS)
	PATH="$(BIN):$$PATH" cython-lint $$(find tokenguard -name '*.p[yx][xdi]' ! -name '*.pyi')

bench: runtime $(DONE)/test ## a short benchmark, and whether its ratios hold
	@tests/get-redis $(VENV)
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only --benchmark-max-time=0.5 \
	    --benchmark-json=benchmarks/results.json
	$(BIN)/python benchmarks/guard.py benchmarks/results.json

build: runtime $(DONE)/test ## an sdist and a wheel in dist/, and whether they hold what they should
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	DIST=dist $(BIN)/python -m pytest tests/integration/test_packaging.py

clean: ## remove all that make has made, .venv/ too
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .benchmarks .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache benchmarks/results.json
	find tokenguard -name '*.c' -delete -o -name '*.so' -delete
	find tokenguard tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The package is installed as editable, so that only what is compiled has to be built again after an edit.
runtime: $(DONE)/runtime $(DONE)/compiled
	@:

$(DONE)/compiled: $(shell find tokenguard -name '*.py' -o -name '*.p[yx][xdi]' -o -name '*.h') $(DONE)/runtime
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(DONE)/runtime: pyproject.toml setup.py $(DONE)/venv
	@echo "Setting up TokenGuard and compiling its core"
	@find tokenguard -name '*.c' -delete
	@$(INSTALL) --group build
	@$(INSTALL) --editable .
	@touch $@

$(DONE)/test $(DONE)/check: $(DONE)/%: pyproject.toml $(DONE)/runtime
	@echo "Setting up the tools for make $*"
	@$(INSTALL) --group $*
	@touch $@

# Debian keeps the headers of Python in a package of their own. Where they are missing, they are unpacked into the
# environment's include folder, which is where a build looks next.
$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "TokenGuard needs Python 3.11 or newer, and $(PYTHON) is not. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@command -v $(firstword $(CC)) >/dev/null || { \
	    echo "There is no C compiler '$(CC)' (on Debian: apt-get install gcc libc6-dev)" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c 'import os.path, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	    echo "Fetching the headers of Python"; \
	    name=python$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_python_version())'); \
	    tools/debs --alone $(VENV)/headers lib$$name-dev && \
	    cp -r $(VENV)/headers/usr/include/$$name/. $(VENV)/headers/usr/include/*-linux-* $(VENV)/include/ || { \
	        echo "The headers of $(PYTHON) are missing (on Debian: apt-get install python3-dev)" >&2; exit 1; }; }
	@$(PIP) install 'pip>=25.1'
	@mkdir -p $(DONE) && echo "$(CURDIR)" >$@
