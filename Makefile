# stagecal: set-up, demonstration, tests. Needs git, make and Python >= 3.11; the rest is fetched. `make help` says more.

VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The interpreter for a new .venv; empty: the first usable one of these. `make clean` first to change it.
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3)

# Arguments for pytest and for the demonstration, quoted for the shell: make test PYTEST_ARGS='-v -k "a or b"'.
PYTEST_ARGS ?=
DEMO_ARGS ?=
# How many tests run at a time; PYTEST_ARGS='-n 0 --pdb' runs them in one process.
TEST_PROCESSES ?= 2

# Programs that tests use as real parts, and the Debian packages that bring them: program:package.
TEST_PROGRAMS := openssl:openssl curl:curl wget:wget strace:strace systemd-analyze:systemd gcc:gcc bindfs:bindfs \
    sshd:openssh-server rsync:rsync slurmctld:slurm-wlm munged:munge

SHELL := /bin/sh
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.SUFFIXES:
.NOTPARALLEL:
.PHONY: help setup new-venv demo test check format casa-worker test-programs clean distclean

# Defines install_packages PACKAGE...: by apt, quietly, as root. No daemon is started by what is installed: the policy
# that says so is put in place for that moment only, where the machine has none of its own.
define APT
install_packages() ( \
    policy=/usr/sbin/policy-rc.d; \
    if [ ! -e $$policy ]; then \
        trap 'rm -f '$$policy EXIT; trap 'exit 1' HUP INT TERM; \
        printf '#!/bin/sh\nexit 101\n' >$$policy && chmod 755 $$policy; \
    fi; \
    export DEBIAN_FRONTEND=noninteractive; \
    echo "installing Debian packages: $$*"; \
    { apt-get -qq update || echo 'apt-get update failed: trying with the lists of before'; } && \
    apt-get -qq -y -o Dpkg::Use-Pty=0 --no-install-recommends install "$$@" >/dev/null; \
) </dev/null; \
can_install() { [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; }
endef

help:
	@echo 'make demo     set up, and show the whole service on this machine (DEMO_ARGS for its arguments)'
	@echo "make test     set up, make check, and run all tests (PYTEST_ARGS for pytest, such as '-v -k \"a or b\"')"
	@echo 'make check    ruff format --check, ruff check, mypy --strict'
	@echo 'make format   let ruff format and mend what it can'
	@echo 'make setup    only the environment .venv (PYTHON names the interpreter, otherwise the newest of 3.11 to 3.13)'
	@echo 'make clean    remove what make made here; distclean also the caches of the tools'

setup: $(STAMP)
	@:

new-venv:
	@$(APT); \
	usable() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	complete() { usable "$$1" && "$$1" -c 'import ensurepip, sqlite3, ssl, venv' >/dev/null 2>&1; }; \
	first() { for python in $(PYTHONS); do if "$$1" "$$python"; then echo "$$python"; return; fi; done; }; \
	python=$$(first complete); \
	if [ -z "$$python" ] && [ -n "$$(first usable)" ]; then \
	    if can_install; then install_packages python3-venv; python=$$(first complete); fi; \
	    if [ -z "$$python" ]; then \
	        echo "$$(first usable) lacks the module venv: install it (Debian: apt-get install python3-venv)" >&2; exit 1; \
	    fi; \
	elif [ -z "$$python" ]; then \
	    echo 'none of $(PYTHONS) is a Python >= 3.11: install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV)

# Without a Python, or with one that has gone from the system since, everything is made anew.
$(STAMP): pyproject.toml $(if $(realpath $(RUN)/python),,new-venv)
	@echo 'installing stagecal and what it needs into $(VENV) (a minute at the first time)'
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: setup
	@$(RUN)/python demo/demo.py $(DEMO_ARGS)

check: setup
	@$(RUN)/ruff format --check --quiet . || { echo 'not formatted: run make format' >&2; exit 1; }
	@$(RUN)/ruff check --quiet .
	@$(RUN)/mypy --strict --no-error-summary

format: setup
	@$(RUN)/ruff check --fix --quiet . ; $(RUN)/ruff format --quiet .

# The environment in which CASA runs, once per user and outside the checkout; it shows its progress itself.
casa-worker: setup
	@$(RUN)/python -m stagecal.casa_worker

test-programs:
	@$(APT); \
	packages=; \
	for pair in $(TEST_PROGRAMS); do \
	    PATH="$$PATH:/usr/sbin:/sbin" command -v "$${pair%%:*}" >/dev/null || packages="$$packages $${pair#*:}"; \
	done; \
	if [ -n "$$packages" ]; then \
	    if ! { can_install && install_packages $$packages; }; then \
	        echo "Tests that need them will be skipped; to run all, as root: apt-get install$$packages" >&2; \
	    fi; \
	fi

test: setup check test-programs casa-worker
	@$(RUN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist demo-site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
