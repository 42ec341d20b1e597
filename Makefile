# make reproduce [PROFILE=cifar10] [OVERRIDES="params/overrides/ci.yaml data.path='my images.zip'"]
PROFILE ?= digits
OVERRIDES ?=
BOX ?= box
PYTHON ?= python3
UV_VERSION := 0.13.8

BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# As they were written, "$" and quotes too: recipes read these from the environment. Snakemake reads the second as YAML.
override OVERRIDES := $(value OVERRIDES)
export PROFILE OVERRIDES
export QUOTED_OVERRIDES := '$(subst ','',$(OVERRIDES))'
SNAKEMAKE := $(BIN)/snakemake --cores all --config profile="$$PROFILE" $(if $(OVERRIDES),overrides="$$QUOTED_OVERRIDES")
# Containers often set it: then each of a run's many processes compiles all that it imports again, two thirds of its start.
unexport PYTHONDONTWRITEBYTECODE
# Where HOME has no place for caches (read-only, or not set), they are kept here.
CACHE := $(shell cache="$${XDG_CACHE_HOME:-$${HOME:-/dev/null}/.cache}"; mkdir -p "$$cache" 2> /dev/null && [ -w "$$cache" ] && echo there)
ifndef CACHE
export XDG_CACHE_HOME := $(CURDIR)/.cache
export XDG_CONFIG_HOME := $(CURDIR)/.cache/config
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
endif
# The programs in .venv know its place: one that came along when the folder was copied or moved is made again.
VENV := $(shell [ "$$(cat .venv/.installed 2> /dev/null)" = "$$(pwd -P)" ] && [ -x $(BIN)/python ] && echo here)
ifndef VENV
.PHONY: .venv/.installed
endif

.DEFAULT_GOAL := help
.PHONY: box unbox dvc.yaml dvc pull help install reproduce test quick torture lint format ui lock unlock clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PROFILE=$$PROFILE  OVERRIDES=$$OVERRIDES  (profiles: $(basename $(notdir $(wildcard params/*.yaml))))"

install: .venv/.installed ## create .venv with the pinned versions (Python >= 3.11)

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=python3.12, for example."; exit 1; }
	@if [ -e $@ ] && [ -z "$(VENV)" ]; then echo ".venv was made in another place, or by an earlier version: it is made again"; rm -rf .venv; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --editable .
	@pwd -P > $@

reproduce: install ## run the profile's whole chain, then show its table
	$(SNAKEMAKE)
	@$(BIN)/ebjdat show --params "params/$$PROFILE.yaml" --overrides "$$OVERRIDES"

test: install ## run the tests, two files at a time
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: install ## the tests of the inner loop: without the workflow, browsers and servers
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 -m "not (torture or slow or workflow or browser or server)"

torture: install ## kills, full disks, damaged files, bad servers and clocks (docs/reliability.md); ONLY=kill, N=50, SEED=0, MINUTES=10
	$(BIN)/python -m pytest -m torture -s tests/torture$(if $(ONLY),/test_$(ONLY).py) $(if $(N),--torture-n $(N)) $(if $(SEED),--torture-seed $(SEED)) \
	  $(if $(MINUTES),--torture-minutes $(MINUTES)) $(if $(ONLY)$(MINUTES),,--torture-page docs/reliability.md)

lint: install ## ruff, mypy, import rules, workflow lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

format: install ## format Python and Snakemake files
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt Snakefile workflow

ui: install ## MLflow UI with all runs on 127.0.0.1, port 5000 (or PORT)
	@$(BIN)/ebjdat sync
	@case "$$MLFLOW_TRACKING_URI" in http*) echo "MLFLOW_TRACKING_URI is a server: open its address in a browser"; exit 1;; esac
	@echo "MLflow starts; then open 127.0.0.1:$(or $(PORT),5000) in a browser and choose Model training"
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --workers 1 --host 127.0.0.1 --port $(or $(PORT),5000) --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

dvc.yaml: install ## bring the profile's dvc.yaml up to date after adding an experiment
	$(BIN)/python workflow/scripts/dvc_stages.py --profile "$$PROFILE"

dvc: dvc.yaml ## reproduce the profile with DVC (another than the default: pipelines/PROFILE/dvc.yaml)
	$(BIN)/dvc repro $(if $(filter digits,$(PROFILE)),dvc.yaml,"pipelines/$$PROFILE/dvc.yaml")

pull: install ## fetch the results that dvc.lock names and say what is still to be run
	@test -n "$$($(BIN)/dvc remote list)" || { echo "No remote is set: dvc remote add --default NAME ADDRESS (docs/versioning.md). Or make the results: make reproduce"; exit 1; }
	@git ls-files --error-unmatch dvc.lock > /dev/null 2>&1 || echo "dvc.lock is not in git here, so nothing says which results belong to this commit"
	$(BIN)/dvc pull
	$(SNAKEMAKE) --dry-run --quiet rules reason host

box: install ## pack a profile's stages for a machine with torch alone, as the folder BOX; EXPERIMENTS="pgd_at eb_jdat", STAGES, ALSO
	@$(BIN)/python workflow/scripts/box.py pack '$(BOX)' --profile "$$PROFILE" --overrides "$$OVERRIDES" \
	  --experiments $(EXPERIMENTS) --stages $(STAGES) --also $(ALSO)

unbox: install ## check the folder BOX that came back and take its results (FORCE=1: in place of others)
	@$(BIN)/python workflow/scripts/box.py take '$(BOX)' $(if $(FORCE),--force)

unlock: install ## after a kill -9: release Snakemake's lock
	$(SNAKEMAKE) --unlock

lock: install ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --no-emit-index-url --no-annotate --no-header \
	  --quiet --upgrade pyproject.toml --output-file requirements.lock

clean: ## delete data, results, checkpoints and tracking (not .venv, not DVC's cache)
	rm -rf data checkpoints results digests state logs benchmarks mlflow.db* mlartifacts .snakemake
