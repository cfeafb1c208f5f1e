# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
# PYTHON picks the interpreter (3.11 or newer); each version gets an environment of its own.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
DEFAULT := $(shell python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter $(VERSION),$(DEFAULT)),.venv,.venv-$(VERSION))
PEERS := .venv-peers
AOT := .venv-aot
RAY := .venv-ray
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check --no-warn-script-location
# A CPU build from the machine's own pip set-up. Installed before anything that would ask for a larger one.
TORCH ?= torch==2.13.0
WORKERS ?= 2

.PHONY: quickstart serve-demo test suite test-serve test-peers test-aot test-pod lint base clean check-python

quickstart: $(VENV)/.installed
	$(BIN)/lorax train --base smollm2-135m --task medical --method lora --steps 64 --batch-size 16 \
		--rank 16 --lr 1e-3 --schedule linear --warmup 4 --out runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

# Three adapters over one small model, asked all at once through the server. They are trained the first time.
$(VENV)/.serving: $(VENV)/.made pyproject.toml
	$(BIN)/python $(PIP) -e '.[demo,serve]'
	touch $@
serve-demo: $(VENV)/.serving
	$(BIN)/python -m lorax.bench.serve_demo

test: lint suite

# The tests alone. TESTS picks some: make suite TESTS=tests/lift
TESTS ?= tests
suite: base
	$(BIN)/python -m pytest $(TESTS) --ignore=tests/peers --ignore=tests/aot --ignore=tests/pod -m "not peers and not aot and not serve and not pod" -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

base: $(VENV)/.tested
	$(BIN)/python -c "from lorax.models import resolve_base; print(resolve_base('smollm2-135m'))"

# The server process under load for two minutes, and its page in Chromium, which must be there (apt-get install chromium).
test-serve: $(VENV)/.tested
	$(BIN)/python -m pytest tests/serve_http tests/test_bench_serve.py -m serve -q

# The wider tier: torch, transformers and PEFT beside lorax. It fails, and does not skip, if they are missing.
test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -c "import torch, transformers, peft, bitsandbytes"
	$(PEERS)/bin/python -c "from lorax.models import resolve_base; print(resolve_base('smollm2-135m'))"
	$(PEERS)/bin/python -m pytest tests/peers -m peers -q  # no test at all is exit code 5

# The kernels: in interpreters, and compiled for TPUs and GPUs by their own compilers, on a machine that has neither.
# One process a file: an interpreter is switched on for a whole process.
AOT_TESTS ?= $(wildcard tests/aot/test_*.py)
test-aot: $(AOT)/.installed
	$(AOT)/bin/python -c "import libtpu, triton, jax_triton, jax_cuda12_plugin, torch"
	for file in $(AOT_TESTS); do \
		JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest $$file -m aot -n $(WORKERS) -q || exit 1; done

# Two and four processes on this machine, joined by hand and by Ray; one is killed. One test at a time: they are many.
test-pod: $(RAY)/.installed
	JAX_PLATFORMS=cpu $(RAY)/bin/python -m pytest tests/pod -m pod -q

check-python:
	@test -n "$(VERSION)" || { echo "lorax: '$(PYTHON)' does not run; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lorax: $(PYTHON) is $(VERSION), and 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 2; }

$(VENV)/.made: | check-python
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(BIN)/python $(PIP) -e '.[demo]'
	touch $@

$(VENV)/.tested: $(VENV)/.made pyproject.toml
	$(BIN)/python $(PIP) -e '.[test]'
	touch $(VENV)/.installed $@

$(PEERS)/.installed: pyproject.toml | check-python
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) '$(TORCH)'
	$(PEERS)/bin/python $(PIP) -e '.[test,peers]'
	touch $@

# The GPU compiler's plugin asks for gigabytes of libraries that compiling does not need.
$(AOT)/.installed: pyproject.toml | check-python
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python $(PIP) '$(TORCH)'
	$(AOT)/bin/python $(PIP) -e '.[test,aot]'
	$(AOT)/bin/python $(PIP) --no-deps $$($(AOT)/bin/python -c "import jax; print(*(f'jax-cuda12-{x}=={jax.__version__}' for x in ('plugin', 'pjrt')))")
	touch $@

$(RAY)/.installed: pyproject.toml | check-python
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python $(PIP) -e '.[test,ray]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
