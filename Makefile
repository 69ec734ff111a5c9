# `make quickstart` and `make test` do all of their own set-up; every target is safe to repeat.
#
#   PYTHON      interpreter that creates the environment (default python3.11, else a python3 that is 3.11 or newer)
#   VENV        where the environment lives (default .venv)
#   PROCESSES   ranks of the quickstart (default 2)
#   ORACLE      where the newest transformers lies, which conversions are compared with (default .oracle)
#   OLDEST      where the oldest torch lies that the package allows (default .oldest)
#   MKDOCS      where mkdocs lies, which builds the site (default .mkdocs)
#   WORKERS     processes that the tests are divided among (default 2; each test may start four ranks more)
#   ARGS        appended to the command of quickstart, bench and the three of tests

PYTHON ?= python3.11
VENV ?= .venv
ORACLE ?= .oracle
OLDEST ?= .oldest
MKDOCS ?= .mkdocs
PROCESSES ?= 2
WORKERS ?= 2
ARGS ?=

SHELL := /bin/sh
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PIP := "$(BIN)/python" -m pip --disable-pip-version-check
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup oracle oldest mkdocs quickstart test test-slow test-oldest lint bench docs site docker clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The stamp holds a digest of what the environment is made from, and where it lies (its scripts name their interpreter
# by absolute path, so a moved one is made anew). It is removed before an installation and written after it: an
# interrupted one is redone. pip resolves its index from the user's own configuration.
setup: ## create the environment and install the locked packages; does nothing when up to date
	@set -eu; \
	venv="$$(realpath -m "$(VENV)")"; \
	digest="$$(cat requirements.lock pyproject.toml | sha256sum | cut -d ' ' -f 1)"; \
	if [ "$$(cat "$(STAMP)" 2>/dev/null)" = "$$digest $$venv" ]; then exit 0; fi; \
	moved=; \
	if [ -f "$(STAMP)" ] && [ "$$(cut -d ' ' -f 2- "$(STAMP)")" != "$$venv" ]; then moved=yes; fi; \
	rm -f "$(STAMP)"; \
	if [ -n "$$moved" ] || ! "$(BIN)/python" -c 'import pip; $(RECENT)' >/dev/null 2>&1; then \
		if [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
			echo "make setup: $(VENV) is not a virtual environment; it is left alone" >&2; exit 1; \
		fi; \
		for python in "$(PYTHON)" python3 ""; do \
			if [ -n "$$python" ] && "$$python" -c '$(RECENT)' >/dev/null 2>&1; then break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "make setup: neither $(PYTHON) nor python3 is Python 3.11 or newer;" \
				"name one that is: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
		fi; \
		echo "creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear "$(VENV)"; \
	fi; \
	echo "installing requirements.lock (minutes, the first time)"; \
	$(PIP) install -q --no-deps -r requirements.lock; \
	$(PIP) install -q --no-deps --no-build-isolation -e .; \
	echo "$$digest $$venv" > "$(STAMP).tmp"; \
	mv "$(STAMP).tmp" "$(STAMP)"; \
	echo "$(VENV) is ready"

# Install the first argument, a lock, into the second, a directory that Python's path may begin with. It is made beside
# its place and moved there when it is whole; one that is up to date is left.
define install_beside
set -eu; \
digest="$$(sha256sum < $(1) | cut -d ' ' -f 1)"; \
if [ "$$(cat "$(2)/.stamp" 2>/dev/null)" = "$$digest" ]; then exit 0; fi; \
echo "installing $(1) into $(2)"; \
rm -rf "$(2).tmp"; \
$(PIP) install -q --no-deps --target "$(2).tmp" -r $(1); \
echo "$$digest" > "$(2).tmp/.stamp"; \
rm -rf "$(2)"; \
mv "$(2).tmp" "$(2)"
endef

oracle: setup ## install the newest transformers into .oracle, for tests and `convert --verify`; does nothing when up to date
	@$(call install_beside,requirements-oracle.lock,$(ORACLE))

oldest: setup ## install the oldest torch that the package allows into .oldest; does nothing when up to date
	@$(call install_beside,requirements-oldest.lock,$(OLDEST))

mkdocs: setup ## install what builds the site into .mkdocs; does nothing when up to date
	@$(call install_beside,requirements-docs.lock,$(MKDOCS))

quickstart: setup ## train a small MoE on this machine's Python standard library, on CPU
	$(BIN)/moefoundry prepare stdlib data/quickstart
	threads=$$(( $$(nproc) / $(PROCESSES) )); \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( threads > 0 ? threads : 1 ))} \
	$(BIN)/composer -n $(PROCESSES) scripts/train.py configs/quickstart.yaml run_name=quickstart autoresume=true \
		icl_tasks=configs/tasks/quickstart.yaml $(ARGS)

test: setup oracle mkdocs lint ## lint, then every test that is not slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: setup oracle mkdocs ## the slow tests
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal $(ARGS)

# these two tests want what requirements.lock says
NOT_LOCKED := --deselect tests/doctor/test_doctor.py::test_versions \
	--deselect tests/project/test_dockerfile.py::test_locked_versions_are_the_installed_ones

test-oldest: oldest oracle mkdocs ## the tests of `make test` with the oldest torch
	PYTHONPATH="$$(realpath "$(OLDEST)")" $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(NOT_LOCKED) $(ARGS)

lint: setup ## style, types, layer order, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

bench: setup ## the comparisons of benchmarks/
	$(BIN)/python -m benchmarks.run $(ARGS)

docs: setup oracle ## regenerate the recipe reference, the table of families and the pictures
	$(BIN)/python -m moefoundry.config.reference docs/recipe.md
	$(BIN)/python docs/families.py
	$(BIN)/python docs/hardware.py
	$(BIN)/python docs/architecture.py
	$(BIN)/python docs/mesh.py

site: mkdocs ## build the pages of docs/ as a site, into build/site; a warning is an error
	PYTHONPATH="$(MKDOCS)" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

docker: ## build the GPU image
	docker build -t moefoundry .

clean: ## remove caches and build outputs; keeps the environment, runs/ and data/
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	for tree in src tests scripts benchmarks docs; do \
		if [ -d $$tree ]; then find $$tree -type d -name __pycache__ -prune -exec rm -rf {} +; fi; \
	done
