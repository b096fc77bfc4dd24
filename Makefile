# make pretrain   from a fresh clone to a trained model and its report
# Every target makes .venv first when it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Processes of tests read what the first one compiled, also where the environment forbids that.
unexport PYTHONDONTWRITEBYTECODE
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(3, (os.cpu_count() or 2) * 3 // 2))")
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m
# Three workers fill two cores, as many of their tests start ranks; a module stays on one worker, for the ranks it keeps.
# More would import and collect everything once more each: six take a seventh longer.
# They come in the order of tests/durations.json: long modules first, so that no worker is alone at the end.
PYTEST := pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
# pytest rewrites every test module before it imports it.  One process does so before all workers would, at the same time.
REWRITTEN := $(ONE_THREAD) pytest -q --collect-only -p no:xdist > /dev/null;
SOURCES := $(wildcard megalina papers placement_lab pretrain_gpt_moe.py tools benchmarks tests museum)

.DEFAULT_GOAL := help
.PHONY: help .venv pretrain test test-full durations coverage lint benchmark gpu-check gpu-kit docs clean

# $(call beside,COMMAND): COMMAND and lint at the same time; both must succeed.  What lint finds comes when COMMAND has ended, and
# a line where it finds nothing, so that a log that is cut to its last lines still shows which tests failed.
define beside
	@said=$$(mktemp); $(MAKE) --no-print-directory lint > $$said 2>&1 & linter=$$!; \
	trap 'kill $$linter; rm -f $$said; exit 130' INT TERM; \
	$(1); tests=$$?; wait $$linter; lint=$$?; trap - INT TERM; \
	if [ $$lint = 0 ]; then echo "lint, import contracts and types: nothing found"; else cat $$said; fi; \
	rm -f $$said; exit $$((tests || lint))
endef

help:  ## this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(READY)  ## set up the Python environment, nothing else

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "megalina needs Python 3.11 or newer as $(PYTHON); name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

pretrain: $(READY)  ## train a GPT-MoE on real text (some minutes), ends with report.html
	$(BIN)/python pretrain_gpt_moe.py experiment=laptop

lint: $(READY)  ## style, import contracts, types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy

test: $(READY)  ## lint and the tests, side by side (4 to 7 minutes on 2 cores)
	$(call beside,$(REWRITTEN) $(ONE_THREAD) $(PYTEST))

test-full: $(READY)  ## lint and all tests, the slow ones and more examples included
	$(call beside,$(REWRITTEN) $(ONE_THREAD) $(PYTEST) -m '' --hypothesis-profile full --timeout 1800)

durations: $(READY)  ## run the tests and record what each module takes (on an idle machine with 2 cores)
	$(ONE_THREAD) $(PYTEST) --record-durations

coverage: $(READY)  ## run the tests and print the line coverage of megalina/, other processes' lines included
	$(BIN)/python -m coverage erase
	$(ONE_THREAD) coverage run -m $(PYTEST) --timeout 900
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

benchmark: $(READY)  ## speed and memory against peers (about 10 minutes, on an idle machine)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/preprocess.py

gpu-check: $(READY)  ## check this machine's GPU, in at most nine minutes; without one, what can run on a CPU
	$(BIN)/python tools/gpu_check.py --out gpu-check

gpu-kit: $(READY)  ## wheels for a machine with a GPU and no network
	$(BIN)/python tools/gpu_kit.py --out gpu-kit

docs: $(READY)  ## write the generated pages, and the site into site/
	$(BIN)/python tools/write_config_docs.py
	$(BIN)/python tools/write_support_matrix.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[docs]'
	$(BIN)/zensical build --strict

clean:  ## remove .venv and all caches; runs and data stay
	rm -rf .venv build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
