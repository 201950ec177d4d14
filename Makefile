# Needs Python 3.11 or newer, git and a C++ compiler; everything else goes into .venv.
#   make run PROFILE=slurm         with workflow/profiles/slurm
#   make run ARGS="--configfile my.yaml"   further arguments for snakemake (or pytest)
#   make run PYTHON=python3.13     this Python makes .venv
#   make run WHEELHOUSE=folder     without a network, from a folder that `make wheelhouse` has filled
ENV := .venv
# The published results that `make published` draws.
MACHINE ?= nvidia-h100
PIP := $(ENV)/bin/python -m pip install -qq --disable-pip-version-check \
	--require-hashes --no-deps --no-compile
# On every core: pip itself would take several times as long. Files that are not Python 3 are left alone.
COMPILE := $(ENV)/bin/python -m compileall -q -q -j 0 $(ENV)/lib || true
ifdef WHEELHOUSE
ifeq ($(wildcard $(WHEELHOUSE)/mnist),)
$(error WHEELHOUSE=$(WHEELHOUSE) is no folder that `make wheelhouse` has made)
endif
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELHOUSE))
CARRIED := mkdir -p results/data/mnist && cp -n "$(WHEELHOUSE)"/mnist/* results/data/mnist/
endif
FETCH := $(ENV)/bin/python -m pip download -q --disable-pip-version-check -d wheelhouse
PROFILES := $(notdir $(wildcard workflow/profiles/*))
ifneq ($(filter-out $(PROFILES),$(PROFILE)),)
$(error unknown profile in PROFILE=$(PROFILE); known: $(PROFILES))
endif
ifneq ($(filter compare,$(MAKECMDGOALS)),)
ifeq ($(and $(A),$(B)),)
$(error make compare: name two folders of results: make compare A=results/reference/nvidia-h100 B=results)
endif
endif
# The stamp of a profile's own dependencies, if it has a lock.
EXTRA := $(if $(wildcard requirements/$(PROFILE).txt),$(ENV)/$(PROFILE))
# A profile says how many cores, unless CORES does. A timed run has all of them to itself; with two cores,
# two figures are drawn at a time.
CORED := $(if $(CORES),--cores $(CORES),$(if $(PROFILE),,--cores 2))
PROFILED := $(if $(PROFILE),--workflow-profile workflow/profiles/$(PROFILE))
# Rules find this environment's programs on PATH.
SNAKEMAKE := PATH="$(CURDIR)/$(ENV)/bin:$$PATH" snakemake $(CORED) $(PROFILED)
# WORKERS processes run the tests; one that has run all of its own takes over some of another's. Tests wait for
# programs and locks a quarter of the time, so that three keep two cores busy. On a GPU they would disturb one another.
WORKERS := $(if $(wildcard /dev/nvidia[0-9]*),1,3)
PYTEST := $(ENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

KERNELS = $(shell find kernels -name '*.cuh' -o -name '*.cpp' -o -name '*.hpp')

# Snakemake needs a writable folder for its cache, one for settings, and the user's name; a container
# may have neither a home folder nor a name for the user id.
ifneq ($(shell [ -w "$$HOME" ] || echo no),)
export XDG_CACHE_HOME ?= $(CURDIR)/.snakemake/cache
export XDG_CONFIG_HOME ?= $(if $(HOME),$(HOME)/.config,$(CURDIR)/.snakemake/config)
endif
ifeq ($(LOGNAME)$(USER),)
export LOGNAME := $(or $(shell id -un 2>/dev/null),user)
endif

AHEAD := $(shell sh requirements/dates.sh $(ENV))
ifneq ($(AHEAD),)
$(info dated in the future: $(AHEAD); stamps are removed, locks are dated now)
endif

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12; echo; sed -n '2,5s/^# *//p' Makefile

run: $(ENV)/base $(EXTRA)  ## run the whole experiment of config.yaml and draw its figures
	@$(ENV)/bin/python requirements/install_pycuda.py
	@$(CARRIED)
	$(SNAKEMAKE) all $(ARGS)

figures: $(ENV)/base $(EXTRA)  ## draw the figures again from results that are there
	$(SNAKEMAKE) figures $(ARGS)

report: $(ENV)/base $(EXTRA)  ## everything on one page; ends by naming report.html
	$(SNAKEMAKE) page $(ARGS)

poster: $(ENV)/base $(EXTRA)  ## an A1 poster; ends by naming poster.pdf (needs Chromium)
	$(SNAKEMAKE) poster $(ARGS)

published: $(ENV)/base  ## draw the published results in a minute, in results/published; MACHINE=nvidia-h100
	@[ -d results/reference/$(MACHINE)/tables ] || { echo "no results/reference/$(MACHINE)" >&2; exit 2; }
	@for each in results/reference/$(MACHINE) results/reference/$(MACHINE)-*; do \
	  to=results/published$${each#results/reference/$(MACHINE)}; \
	  [ ! -d $$each ] || { rm -rf $$to && cp -r $$each $$to; } || exit; done
	@rm -rf results/published/figures
	$(SNAKEMAKE) page --config results=results/published $(ARGS)

compare: $(ENV)/base  ## is one folder of results slower than another? make compare A=FOLDER B=FOLDER
	@$(ENV)/bin/python -m cnnlib compare "$(A)" "$(B)" $(ARGS)

test: $(ENV)/dev $(ENV)/cluster-generic  ## run the tests, in three processes
	$(PYTEST) $(ARGS)

quick: $(ENV)/dev  ## run a one-minute subset of the tests, before every commit
	$(PYTEST) -m "quick and not slow" $(ARGS)

smoke: $(ENV)/base $(EXTRA)  ## run the whole workflow on a small artificial data set: about a minute
	$(SNAKEMAKE) all --configfile tests/tiny.yaml --config results=results/smoke $(ARGS)

docs: $(ENV)/docs  ## build the documentation into docs/_build/html; a warning is an error
	$(ENV)/bin/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html $(ARGS)

lint: $(ENV)/dev  ## check style, types and the workflow
	$(ENV)/bin/ruff check
	$(ENV)/bin/ruff format --check
	$(ENV)/bin/mypy
	$(ENV)/bin/snakefmt --check Snakefile workflow
	$(ENV)/bin/clang-format --dry-run --Werror $(KERNELS)
	$(SNAKEMAKE) --lint

format: $(ENV)/dev  ## format Python, Snakemake and CUDA files and fix what can be fixed
	$(ENV)/bin/ruff check --fix
	$(ENV)/bin/ruff format
	$(ENV)/bin/snakefmt Snakefile workflow
	$(ENV)/bin/clang-format -i $(KERNELS)

sanitize: $(ENV)/dev  ## run the kernels under sanitizers: the emulated ones, and a GPU's if there is one
	$(PYTEST) -k sanitize $(ARGS)
	@sh kernels/tools/sanitize.sh

profile:  ## profile a stage on a GPU by nsys and ncu: make profile STAGE=tuned BATCH=64
	@sh kernels/tools/profile.sh check "$(STAGE)"
	@$(MAKE) --no-print-directory $(ENV)/base
	@sh kernels/tools/profile.sh run "$(STAGE)" $(BATCH)

wheelhouse: $(ENV)/base  ## fetch all that a machine without a network needs into wheelhouse/
	@mkdir -p wheelhouse
	for name in base cuda slurm cluster-generic; do \
	  $(FETCH) --require-hashes --no-deps -r requirements/$$name.txt || exit; \
	done
	$(FETCH) setuptools wheel  # for what comes as source
	$(ENV)/bin/python -m cnnlib download --dataset mnist --folder wheelhouse/mnist

lock:  ## pin all dependencies anew, from requirements/*.in (needs uv)
	for name in base cuda dev docs slurm cluster-generic; do \
	  uv pip compile --quiet --no-config --universal --python-version 3.11 --upgrade --generate-hashes \
	    --no-annotate --no-header requirements/$$name.in -o requirements/$$name.txt || exit; \
	done

clean:  ## remove results, but not downloaded data and results/reference
	[ ! -d results ] || find results -mindepth 1 -maxdepth 1 ! -name data ! -name reference -exec rm -rf {} +
	rm -rf docs/_build .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean  ## remove downloaded data and the environment too
	rm -rf results/data $(ENV)
	find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp says that the environment agrees with a lock; it is made again when the lock changes.
$(ENV)/base: requirements/base.txt requirements/cuda.txt
	$(if $(shell [ ! -L $(ENV) ] || echo link),$(error $(ENV) is a link to a folder that would be emptied; remove it first))
	$(eval found := $(shell sh requirements/find_python.sh $(PYTHON)))
	$(if $(filter-out 0,$(.SHELLSTATUS)),$(error $(found)))
	@echo "Making $(ENV) with $(found) and installing pinned packages (about a minute)"
	@"$(found)" -m venv --clear $(ENV)
	@$(PIP) -r requirements/base.txt && { $(COMPILE); } && touch $@

$(ENV)/%: requirements/%.txt $(ENV)/base
	@$(PIP) -r $< && { $(COMPILE); } && touch $@

.PHONY: help run figures report poster published compare test quick smoke docs lint format sanitize profile wheelhouse lock \
	clean distclean
