# Every target runs in .venv, with the versions of constraints.txt, and makes it first if it is missing.
# PYTHON=/path/to/python3.13 chooses its Python; without it the first one on PATH that fits is used.
SHELL := /bin/sh
ARGS ?=
PYTHON ?=

# Settings of the shell must not add packages to those of .venv.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup train test test-cluster coverage fuzz tensorboard lint results matrix

help:
	@echo 'make train        train SASRec on MovieLens-100K; ARGS="model.dim=50 seed=1" sets keys, ARGS=--help lists them'
	@echo 'make tensorboard  show the runs in outputs/'
	@echo 'make test         run every test; ARGS="-k metrics" runs some of them, ARGS="-n0 --pdb" stops at a failure'
	@echo 'make test-cluster  run the tests that need Ray, in an environment of their own, .venv-cluster'
	@echo 'make coverage     run every test, and list the lines and branches that none reaches'
	@echo 'make fuzz         feed readers and command line with mutated inputs, for minutes; ARGS=7 takes another seed'
	@echo 'make lint         check style, format, types, and that the pages show the data of docs/results'
	@echo 'make results      for a release: measure again what takes minutes, and update the pages'
	@echo 'make matrix       install and try the wheel with other versions of Python, torch and Hydra; takes GB and minutes'
	@echo 'make setup        create .venv only; the other targets do this when needed'

setup: .venv/.complete
	@echo "ready: .venv"

train: .venv/.complete
	@.venv/bin/python -m sasrec_lab.train $(ARGS)

# Run one process per core, each with one thread. ARGS=-n0 runs all tests in one process, which --pdb needs.
test: .venv/.complete
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

# Ray is 0.3 GB that `make test` does not need, and another release of its parts may clash with a launcher's: joblib's and
# Ray's launchers of Hydra already pin two versions of cloudpickle. So .venv-cluster adds Ray to the packages of .venv.
test-cluster: .venv-cluster/.complete
	@OMP_NUM_THREADS=1 .venv-cluster/bin/python -m pytest -n0 tests/training/test_ray_workers.py $(ARGS)

.venv-cluster/.complete: .venv/.complete
	@.venv/bin/python -m venv --clear .venv-cluster
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	    { pwd; .venv/bin/python -c "$$site"; } > "$$(.venv-cluster/bin/python -c "$$site")/base.pth"
	@.venv-cluster/bin/python -m pip install -q -c constraints.txt "$$(.venv/bin/python -c \
	    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cluster"])')" \
	    && touch $@

coverage: .venv/.complete
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered $(ARGS)

# It prints each exception that is not one line for the user, with a small input that causes it.
fuzz: .venv/.complete
	@OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz/readers.py 10000 $(ARGS)
	@OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz/command_lines.py 5000 $(ARGS)

tensorboard: .venv/.complete
	@.venv/bin/python -m tensorboard.main --logdir outputs $(ARGS)

lint: .venv/.complete
	@.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/python scripts/render_results.py --check

# It takes about an hour on two idle cores, from a committed tree, with home-5core/interactions.csv (Amazon Home) in the
# data root, and downloads RecTools and RePlay. Trained models take hours: docs/results has the commands of their tables.
results: .venv/.complete
	@.venv/bin/python scripts/bench.py --json outputs/roofline.json
	@.venv/bin/python scripts/bench_peers.py --json outputs/speed.json
	@.venv/bin/python scripts/parity_peers.py --json outputs/parity.json
	@mv outputs/roofline.json outputs/speed.json outputs/parity.json docs/results/ && .venv/bin/python scripts/render_results.py

matrix: .venv/.complete
	@.venv/bin/python scripts/support_matrix.py --json docs/results/support.json $(ARGS)
	@.venv/bin/python scripts/render_results.py

# On Linux without a C++ compiler this installs one too, for the kernels (sasrec_lab/ops/library.py).
# It keeps an existing .venv that is complete and has a Python that fits. It writes the stamp last, so that the next call
# continues an interrupted set-up. It runs each candidate to try it, because pyenv has shims of Pythons that it lacks.
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
	        echo "$$bare cannot create virtual environments (it has no ensurepip); on Debian or Ubuntu: sudo apt install python$$version-venv" >&2; exit 1; \
	    elif [ -z "$$found" ]; then \
	        echo "no Python 3.11, 3.12 or 3.13 $(if $(PYTHON),at PYTHON=$(PYTHON),on PATH); install one, and if it is not on PATH run: make setup PYTHON=/path/to/python3.13" >&2; exit 1; \
	    fi; \
	    echo "creating .venv with $$("$$found" -V); downloading the packages takes some minutes (up to 3 GB on Linux with CUDA, 0.4 GB on macOS)"; \
	    rm -rf .venv && mkdir .venv && touch .venv/.unfinished && "$$found" -m venv .venv || exit 1; \
	else \
	    echo "updating .venv"; \
	fi; \
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[test]' \
	    || { echo "setup failed (see above); run the same command to retry" >&2; exit 1; }; \
	if [ "$$(uname)" = Linux ] && [ -z "$${CXX+set}" ] && ! command -v clang++ >/dev/null && ! command -v g++ >/dev/null; then \
	    .venv/bin/python -m pip install -q -c constraints.txt -e '.[compiler]' \
	        || echo "no C++ compiler found, and installing one failed; training will be slower" >&2; \
	fi; \
	rm -f .venv/.unfinished && touch $@
