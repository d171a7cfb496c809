# make quickstart   install into .venv and pretrain a tiny ELECTRA on text that this machine already has
# make test         install and run all tests but the nightly ones
# make docs         build the documentation's site in site/
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip
# Which versions of the dependencies to install: those of constraints.txt, the lowest that pyproject.toml allows, or the
# newest.
DEPENDENCIES ?= tested
LOWEST := sed -nE 's/^  "([A-Za-z0-9_-]+)(\[[a-z]+\])?>=([^,"]+).*/\1==\3/p' pyproject.toml
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
ifeq ($(DEPENDENCIES),lowest)
TORCH := $(shell $(LOWEST) | sed -n 's/^torch==//p').0
endif
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# Only these builds have code for cards below compute capability 7.5 (Maxwell, Pascal, Volta).
TORCH_OLD_CARDS_INDEX := https://download.pytorch.org/whl/cu126
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-quick test-nightly coverage lint types docs check-install clean

install: $(INSTALLED)

# torch comes first: whatever depends on it would otherwise bring the newest build with gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@oldest=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+$$' | sort -V | head -n 1); \
	if [ -n "$$oldest" ] && [ "$$(printf '%s\n7.5\n' "$$oldest" | sort -V | head -n 1)" != 7.5 ]; then \
	  echo "installing torch $(TORCH) for a GPU of compute capability $$oldest"; \
	  $(PIP) install -q --no-compile --index-url $(TORCH_OLD_CARDS_INDEX) torch==$(TORCH)+cu126; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
	  echo "installing torch $(TORCH) for this machine's GPU"; $(PIP) install -q --no-compile torch==$(TORCH); \
	else \
	  echo "no GPU here: installing the CPU build of torch $(TORCH)"; \
	  $(PIP) install -q --no-compile torch==$(TORCH)+cpu 2>/dev/null || $(PIP) install -q --no-compile --index-url $(TORCH_CPU_INDEX) torch==$(TORCH); \
	fi
	@echo "installing electra_ds and what it needs"
	@case $(DEPENDENCIES) in \
	  tested) cp constraints.txt $(VENV)/constraints.txt ;; \
	  lowest) $(LOWEST) > $(VENV)/constraints.txt ;; \
	  newest) : > $(VENV)/constraints.txt ;; \
	  *) echo "DEPENDENCIES is tested, lowest or newest, not $(DEPENDENCIES)" >&2; exit 2 ;; \
	esac
	$(PIP) install -q --no-compile -c $(VENV)/constraints.txt -e '.[dev]'
	@echo "compiling what the commands import"
	@PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -W ignore -c "import torch._dynamo, deepspeed, datasets, sklearn.metrics, scipy.stats, wandb, \
	  matplotlib.pyplot, transformers.models.electra.modeling_electra, ray.tune, electra_ds.cli, electra_ds.sweep.tune" >/dev/null 2>&1 || true
	@touch $@

quickstart: install
	$(VENV)/bin/python bin/pretrain --ds-config ds_configs/cpu.json --recipe tiny

# A file's tests run in one process, which makes what they share once. Compiled tests are cached, since each of several
# processes reads them all.
PYTEST := PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 25

test: install
	$(PYTEST)

test-quick: install
	$(PYTEST) -m "not slow and not nightly"

test-nightly: install
	$(PYTEST) -m nightly

# Of the quick tests, whose processes are this one and forks of one that it starts.
coverage: install
	$(PYTEST) -m "not slow and not nightly" --cov=electra_ds --cov-report=
	$(VENV)/bin/coverage report --skip-covered --sort=cover | tee coverage.txt

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell

types: install
	$(VENV)/bin/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# The sdist and the wheel built from it, in a clean environment, away from the checkout.
check-install: install
	rm -rf build dist .check-install && mkdir .check-install
	$(VENV)/bin/python -m build -q --outdir .check-install
	$(PYTHON) -m venv .check-install/venv
	$(PIP) --python .check-install/venv/bin/python install -q --no-compile torch==$(TORCH)+cpu 2>/dev/null \
	  || $(PIP) --python .check-install/venv/bin/python install -q --no-compile --index-url $(TORCH_CPU_INDEX) torch==$(TORCH)
	$(PIP) --python .check-install/venv/bin/python install -q --no-compile -c constraints.txt "$$(ls .check-install/*.whl)[tensorboard]"
	cp tests/check_install.sh .check-install && cd .check-install && PYTHONDONTWRITEBYTECODE= sh check_install.sh
	rm -rf .check-install build

clean:
	rm -rf $(VENV) build dist site .coverage coverage.txt .check-install .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
