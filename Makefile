# Needs Python 3.10 to 3.13 and a C++ compiler; everything else goes into .venv. A CUDA toolkit is
# used where there is one. For the small CPU build of torch, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the extension and the environment are made from: a change to any of it installs again.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/per_isa/*)

.PHONY: demo mnist lab zoo test test-minimal test-slow wheel bench lint docs clean

demo: $(VENV)/demo.stamp  ## train on handwritten digits with and without the entropy penalty
	$(BIN)/python examples/digits.py

mnist: $(VENV)/demo.stamp  ## the penalty on MNIST, three seeds; goes on where it was killed
	$(BIN)/python examples/mnist.py --output mnist

# Two at a time, one thread each. A dumb terminal: two progress bars would overwrite each other.
lab: $(VENV)/lab.stamp  ## three small studies and experiments/report/report.html
	printf '%s\n' weight_spectra distillation dynamics | \
		OMP_NUM_THREADS=1 TERM=dumb xargs -P 2 -n 1 $(BIN)/ses-lab run
	$(BIN)/ses-lab report

# torchvision wants a torch of its own release: an environment of its own, of several GB.
zoo:  ## docs/zoo.md: what is measured of models of torchvision, timm and transformers
	test -x $(VENV)-zoo/bin/python || $(PYTHON) -m venv $(VENV)-zoo
	$(VENV)-zoo/bin/python -m pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.23.0 -e .
	$(VENV)-zoo/bin/python tools/zoo.py --output docs/zoo.md

# One BLAS thread in each of two workers: small matrices gain nothing from more.
test: $(VENV)/test.stamp  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-minimal: $(VENV)/test.stamp  ## ses_kernels as installed without a compiler and without Triton
	PYTHONPATH=python_tests/minimal OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --ignore python_tests/lab

test-slow: $(VENV)/test.stamp  ## what the marker slow keeps out of the suite: every study of the lab, AArch64
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

wheel:  ## sdist and manylinux wheel of PYTHON in dist/, tried with TORCH=2.13.0 in a clean environment
	PYTHON=$(PYTHON) tools/wheel.sh

bench: $(VENV)/bench.stamp  ## bench/results/<device>.json; BENCH="--budget 0.1 -k ResNet-18" for less
	$(BIN)/python -m bench $(BENCH)

lint: $(VENV)/test.stamp  ## style of Python and C++, types of ses_kernels
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/per_isa/* bench/*.cpp)

# The docstrings are read as text: nothing is imported, and it takes seconds. From Python 3.11 on.
docs: $(VENV)/test.stamp  ## site/index.html; a warning or a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/%.stamp: $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	$(BIN)/python -m ses_kernels
	touch $@

clean:  ## all that the targets above made
	rm -rf $(VENV) $(VENV)-zoo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks digits.png mnist experiments site
	find . -name __pycache__ -prune -exec rm -rf {} +
	find ses_kernels -name '*.so' -delete
