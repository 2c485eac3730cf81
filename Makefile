# make demo   train two networks that teach each other on Fashion-MNIST, print what they learned, and write a report
# make test   lint, types and every test that this machine can run
# make coverage   all tests, and how much of the code they run: counting lines takes short tests two thirds longer
# make test-fast   what one runs while writing: no whole run, no slow test, no cluster, no group of processes
# All set everything up first, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread in every process, as more of them run than there are cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder

.PHONY: demo test coverage test-fast lint types setup clean

demo: $(READY)
	rm -rf runs/demo
	$(BIN)/peerlearn pretrain mcl_fashion_mnist_demo --run runs/demo
	$(BIN)/peerlearn report runs/demo

test: $(READY) lint types
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null || \
		echo "no SLURM here: its tests are skipped; to have them run: sh scripts/system_packages.sh slurm"
	@command -v chromedriver >/dev/null || \
		echo "no Chromium here: the tests of pages are skipped; to have them run: sh scripts/system_packages.sh browser"
	$(PYTEST)

coverage: $(READY)
	$(PYTEST) --cov --cov-report=term:skip-covered

test-fast: $(READY) lint
	$(PYTEST) -m "not slow and not slurm and not ddp" $(addprefix --ignore=tests/,e2e slurm studies)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml scripts/system_packages.sh
	PYTHON=$(PYTHON) sh scripts/system_packages.sh
	$(PYTHON) -c 'import sys; sys.exit("peerlearn needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	@if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then extras=dev,ffcv; else extras=dev; \
		echo "no OpenCV or libturbojpeg to compile ffcv with, so packed files cannot be read; to have it:" \
			"sh scripts/system_packages.sh ffcv && $(BIN)/python -m pip install --editable '.[ffcv]'"; fi; \
	$(BIN)/python -m pip install --editable ".[$$extras]" || { \
		echo "without ffcv, which could not be compiled:" && $(BIN)/python -m pip install --editable '.[dev]'; }
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
