# One line each: what a newcomer can do here. `make PYTHON=python3.12 ...` chooses the interpreter: the one that makes
# .venv, or, for the card targets, the one that runs them, as it is: then nothing is installed.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TOOLS := build/tools
# Of card and card-more, on the command line: DEVICE=cpu rehearses, DRY=1 prints the plan, PARTS=smoke,tests runs these
# parts only, SECONDS_IN_ALL is the time for everything (300), OUT a folder for copies of the results.
export DEVICE DRY PARTS SECONDS_IN_ALL OUT
ifneq ($(filter command environment,$(origin PYTHON)),)
CARD := $(PYTHON) -m benchmarks.card
else
CARD := $(BIN)/python -m benchmarks.card
card card-more: $(STAMP)
endif

DEMO := --batch-size 64 --drop-path 0 --mixup 0 --cutmix 0
DEMO_DENSE := --model vit_tiny_patch16_224 --model-kwargs embed_dim=96 depth=4 num_heads=4 --epochs 100 --lr 2e-3
DEMO_SEARCH := --target 50% --epochs 40 --lr 1e-3 \
	--finetune-epochs 40 --finetune-lr 1e-3 --layer-decay None --no-model-ema

.DEFAULT_GOAL := help
.PHONY: help install demo test reliability bench lock audit card card-more compile-sweep

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## .venv with the dependencies of requirements.lock and the project itself, editable

$(STAMP): setup.py requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned versions need Python 3.11 or newer, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)  ## train, search and export a small ViT on real images: under 5 minutes on two cores
	rm -rf runs/demo-dense runs/demo
	$(BIN)/ofb train --output runs/demo-dense $(DEMO) $(DEMO_DENSE)
	$(BIN)/ofb search --output runs/demo --checkpoint runs/demo-dense $(DEMO) $(DEMO_SEARCH)

test: $(STAMP)  ## lint and every test: about 25 minutes on two cores
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

compile-sweep: $(STAMP)  ## compile every kernel launch of tests and benchmarks for every architecture: an hour, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.resources --arch 80 86 89 90 100 120

reliability: $(STAMP)  ## what must not go wrong, at night length: half an hour; writes docs/RELIABILITY.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability

bench: $(STAMP)  ## a search step beside a dense step, on this CPU
	$(BIN)/python -m benchmarks.step --device cpu

lock: $(TOOLS)  ## requirements.lock anew, from setup.py and constraints.txt
	$(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra test \
		--constraint constraints.txt --custom-compile-command 'make lock' --output-file requirements.lock setup.py

audit: $(TOOLS)  ## known vulnerabilities of what requirements.lock installs
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 || { rm -r $@; false; }

card:  ## on this machine's GPU, in 5 minutes: is every op right, how fast are ops and steps (docs/gpu.md)
	$(CARD) first

card-more:  ## 5 more minutes: compiled rivals, DeiT-B, a search on the clock, the memory checker
	$(CARD) more
