# Everything runs in .venv with the versions of constraints.txt; the first call of any target makes it.
# PYTHON=/path/to/python3.13 chooses the Python for it, otherwise the first that fits is taken.
SHELL := /bin/sh
ARGS ?=
PYTHON ?=

# Only what is installed in .venv counts, whatever the shell has set.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test tensorboard lint results

help:
	@echo 'make train        train SASRec on MovieLens-100K; ARGS="model.dim=64 seed=1" changes keys, ARGS=--help lists them'
	@echo 'make tensorboard  look at the runs in outputs/'
	@echo 'make test         run every test; ARGS="-k metrics" runs some of them, ARGS="-n0 --pdb" stops at a failure'
	@echo 'make lint         check style, format, and that the pages show the data of docs/results'
	@echo 'make results      for a release: measure again what takes minutes, and update the pages'
	@echo 'make setup        only make .venv, which all of these do by themselves'

setup: .venv/.complete
	@echo "ready: .venv"

train: .venv/.complete
	@.venv/bin/python -m sasrec_lab.train $(ARGS)

# One process a core, each with one thread; ARGS=-n0 runs all tests in one process, as --pdb needs it.
test: .venv/.complete
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

tensorboard: .venv/.complete
	@.venv/bin/python -m tensorboard.main --logdir outputs $(ARGS)

lint: .venv/.complete
	@.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check .
	@.venv/bin/python scripts/render_results.py --check

# It takes about an hour on two idle cores, from a committed tree, with home-5core/interactions.csv (Amazon Home) in the
# data root, and downloads RecTools and RePlay. Trained models take hours: docs/results has the commands of their tables.
results: .venv/.complete
	@.venv/bin/python scripts/bench.py --json outputs/roofline.json
	@.venv/bin/python scripts/bench_peers.py --json outputs/speed.json
	@.venv/bin/python scripts/parity_rectools.py --json outputs/parity.json
	@mv outputs/roofline.json outputs/speed.json outputs/parity.json docs/results/ && .venv/bin/python scripts/render_results.py

# On Linux without a C++ compiler one is installed too, for the kernels (sasrec_lab/ops/library.py).
# A .venv that is there is kept if it is whole and of a Python that fits. The stamp comes last, so that a set-up that was
# cut off is taken up again. A candidate is tried by running it: pyenv's shims, for one, are there without their Python.
.venv/.complete: pyproject.toml constraints.txt
	@fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	if [ -e .venv/.unfinished ] || ! .venv/bin/python -c "$$fits; import pip" 2>/dev/null; then \
	    found=; bare=; \
	    for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	        "$$python" -c "$$fits" 2>/dev/null || continue; \
	        if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	        bare=$${bare:-$$python}; \
	    done; \
	    if [ -z "$$found" ] && [ -n "$$bare" ]; then \
	        version=$$("$$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	        echo "$$bare cannot make virtual environments (it has no ensurepip); on Debian or Ubuntu: sudo apt install python$$version-venv" >&2; exit 1; \
	    elif [ -z "$$found" ]; then \
	        echo "no Python 3.11, 3.12 or 3.13 $(if $(PYTHON),at PYTHON=$(PYTHON),on PATH); install one and name it if it is not on PATH: make setup PYTHON=/path/to/python3.13" >&2; exit 1; \
	    fi; \
	    echo "making .venv with $$("$$found" -V); the packages are downloaded once (up to 3 GB on Linux with CUDA, 0.4 GB on macOS), some minutes"; \
	    rm -rf .venv && mkdir .venv && touch .venv/.unfinished && "$$found" -m venv .venv || exit 1; \
	else \
	    echo "bringing .venv up to date"; \
	fi; \
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[test]' \
	    || { echo "set-up did not finish; the reason stands above, and the same command tries again" >&2; exit 1; }; \
	if [ "$$(uname)" = Linux ] && [ -z "$${CXX+set}" ] && ! command -v clang++ >/dev/null && ! command -v g++ >/dev/null; then \
	    .venv/bin/python -m pip install -q -c constraints.txt -e '.[compiler]' \
	        || echo "no C++ compiler here, and none that can be installed: training is slower" >&2; \
	fi; \
	rm -f .venv/.unfinished && touch $@
