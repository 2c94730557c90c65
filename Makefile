# The developer's interface. Every verb does its own set-up.

python := .venv/bin/python
# Mounting needs root. Without root and without sudo the suite runs all the same, and says what it could not do.
sudo := $(if $(filter 0,$(shell id -u)),,$(shell command -v sudo))
# More arguments for pytest, as in: make test PYTEST_ARGS='-k rename -x'
PYTEST_ARGS :=
# More for the benchmark, as in: make bench BENCH_ARGS='--rounds 1 --only small'
BENCH_ARGS :=

# Where `make install` puts things, beneath DESTDIR; mount(8) looks for its helpers in /sbin only.
PREFIX := /usr/local
HELPERDIR := /sbin
# FUSE_OVERLAYFS=yes also installs a program of that name, for those who look for it by name.
FUSE_OVERLAYFS :=

# How often `make torture` kills the process that serves, in each of three modes
KILLS := 500

.PHONY: help setup demo test test-lowest torture check lint bench bench-podman bench-roundtrip install screenshots clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: system packages, .venv, the package in it
	@scripts/setup

demo: setup ## mount a container root of three layers, work in it, compare with kernel overlayfs
	@$(python) -m scripts.demo

test: setup ## run the whole test suite (as root: mounting needs it)
	$(sudo) $(python) scripts/test $(PYTEST_ARGS)

test-lowest: ## the same with the oldest versions of every dependency that pyproject.toml admits
	scripts/setup --lowest
	$(sudo) .venv-lowest/bin/python -m pytest $(PYTEST_ARGS)

torture: setup ## kill the process that serves, again and again, beneath a load that must not see it
	$(sudo) $(python) -m tests.system.torture --kills $(KILLS)

lint: setup ## formatting, ruff, strict types
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m mypy

check: lint ## lint, floors, unit and union tests: the quick round before a commit
	$(sudo) $(python) -m pytest $(PYTEST_ARGS) tests/unit tests/union

bench: setup ## time the same work on kernel overlayfs, fuse-overlayfs and unionfsd; a table and docs/images/bench.svg
	@mkdir -p docs/images
	$(sudo) $(python) scripts/bench $(BENCH_ARGS) --picture docs/images/bench.svg

install: setup ## install into PREFIX (/usr/local), beneath DESTDIR: programs, units, manual pages, completions
	scripts/install '$(DESTDIR)' '$(PREFIX)' '$(HELPERDIR)' '$(FUSE_OVERLAYFS)'

screenshots: setup ## make the pictures of the README from the real programs
	$(sudo) $(python) -m scripts.screenshots

bench-podman: setup ## time podman over unionfsd and over fuse-overlayfs
	$(sudo) $(python) -m scripts.bench_podman

bench-roundtrip: setup ## what one message to a FUSE daemon costs on this machine, whatever the daemon
	$(sudo) $(python) -m scripts.roundtrip

clean: ## remove everything the other verbs made
	@# Tests that ran under sudo leave files of root behind.
	$(sudo) rm -rf .venv .venv-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec $(sudo) rm -rf {} +
