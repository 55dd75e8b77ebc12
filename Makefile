# One line each: what a newcomer can do here. `make PYTHON=python3.12 ...` chooses the interpreter:
# the one that makes .venv, or, for the gpu targets, the one that runs them (nothing is installed).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TOOLS := build/tools
OP_TESTS := $(foreach module,bimask masked_linear masked_mlp masked_attention masked_layer_norm masked_add_layer_norm local_norm \
	dispatch nn supernet graph deit_shapes tuning,tests/test_$(module).py)

DEMO := --batch-size 64 --drop-path 0 --mixup 0 --cutmix 0
DEMO_DENSE := --model vit_tiny_patch16_224 --model-kwargs embed_dim=96 depth=4 num_heads=4 --epochs 100 --lr 2e-3
DEMO_SEARCH := --target 50% --epochs 40 --lr 1e-3 \
	--finetune-epochs 40 --finetune-lr 1e-3 --layer-decay None --no-model-ema

.DEFAULT_GOAL := help
.PHONY: help install demo test compile-sweep reliability bench lock audit gpu gpu-test gpu-bench gpu-sanitize gpu-tune

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## .venv with the dependencies of requirements.lock and the project itself, editable

$(STAMP): setup.py requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned versions need Python 3.11 or newer, this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)  ## train, search and export a small ViT on real images: under 5 minutes on two cores
	rm -rf runs/demo-dense runs/demo
	$(BIN)/ofb train --output runs/demo-dense $(DEMO) $(DEMO_DENSE)
	$(BIN)/ofb search --output runs/demo --checkpoint runs/demo-dense $(DEMO) $(DEMO_SEARCH)

test: $(STAMP)  ## lint and every test: under 15 minutes on two cores
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

gpu: gpu-test gpu-bench  ## op tests and benchmarks on this machine's GPU, with $(PYTHON) as it is

gpu-test:  ## the op tests on real kernels
	$(PYTHON) -m pytest -q $(OP_TESTS)

gpu-bench:  ## the step and op benchmarks: CSVs and a page under benchmarks
	$(PYTHON) -m benchmarks.step --device cuda --quick
	$(PYTHON) -m benchmarks.ops --device cuda --quick
	$(PYTHON) -m benchmarks.page

# Without torch's caching of memory, memcheck sees where each tensor ends.
gpu-sanitize:  ## the op tests under compute-sanitizer's memcheck and racecheck, for hours: not run yet, no GPU was at hand
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q $(OP_TESTS)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest -q $(OP_TESTS)

gpu-tune:  ## tune the kernels on this GPU, and ship what was fastest in ofb_kernels/measured.json
	OFB_KERNELS_AUTOTUNE=1 $(PYTHON) -m benchmarks.ops --device cuda --quick
	$(PYTHON) -m benchmarks.decide
