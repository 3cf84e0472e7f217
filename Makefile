# Needs git, make and Python >= 3.11. No root, no GPU. Everything goes into $(VENV); ARGS are passed on to the command.

VENV ?= .venv
RUN := $(VENV)/bin/python
WORKS := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do if $$p $(WORKS); then echo $$p; break; fi; done)
PYTHONS ?= $(shell for v in 3.12 3.13; do for p in python$$v $$HOME/.pyenv/versions/$$v*/bin/python; do \
	if $$p $(WORKS); then echo $$p; break; fi; done; done)
WORKERS := -n auto --maxprocesses 8 --dist worksteal
LOCK := uv pip compile --universal --python-version 3.11 --generate-hashes --group test pyproject.toml

.PHONY: help train test test-slow test-matrix bench cuda12 cuda13 plan lock clean

help:
	@echo 'make train         train configs/quickstart.py on whatever this machine has'
	@echo 'make test          the fast tests; test-slow: those that take minutes'
	@echo 'make test-matrix   the fast tests on Python 3.12 and 3.13 with the newest jax, where the machine has them'
	@echo 'make bench         measure this machine and our training step on it (an NVIDIA GPU)'
	@echo 'make cuda12        add the NVIDIA libraries of CUDA 12 to $(VENV); cuda13: of CUDA 13'
	@echo 'make plan          add to $(VENV)/plan what compiles GPU programs without a GPU (1 GB); some slow tests take it'
	@echo 'make lock          resolve requirements.lock again; ARGS=--upgrade takes the newest of everything'

train: $(VENV)/ready
	$(VENV)/bin/jaxtrain train configs/quickstart.py $(ARGS)

test: $(VENV)/ready
	$(RUN) -m pytest $(WORKERS) $(ARGS)

test-slow: $(VENV)/ready
	$(RUN) -m pytest $(WORKERS) -m slow $(ARGS)

test-matrix: test
	@test -n "$(PYTHONS)" || echo 'test-matrix: skipped, neither PATH nor ~/.pyenv/versions has Python 3.12 or 3.13; or set PYTHONS'
	@set -e; for p in $(PYTHONS); do \
		v=$$($$p -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		$(MAKE) test PYTHON=$$p VENV=.venv-$$v; \
	done

bench: $(VENV)/ready
	$(RUN) -m benchmarks.gpu $(ARGS)

cuda12 cuda13: $(VENV)/ready
	$(RUN) -m pip install "jax[$@]==$$($(RUN) -c 'import jax; print(jax.__version__)')"

# In a folder apart: where jax finds the plugin and no GPU, every run would start with its complaint.
plan: $(VENV)/ready
	v=$$($(RUN) -c 'import jax; print(jax.__version__)'); $(RUN) -m pip install --no-deps --upgrade --target $(VENV)/plan \
		"jax-cuda13-plugin==$$v.*" "jax-cuda13-pjrt==$$v.*" 'nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14'

lock: $(VENV)/ready
	$(RUN) -m pip install --quiet uv
	$(VENV)/bin/$(LOCK) --quiet --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS)

clean:
	rm -rf .venv .venv-* build *.egg-info

# The stamp: made again when the lock or the project changes.
$(VENV)/ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo 'Python >= 3.11 was not found as python3, python3.13, python3.12 or python3.11; name one: make PYTHON=/path/to/python'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo '$(PYTHON) cannot make a virtual environment. It lacks venv or ensurepip: install your system'"'"'s python3-venv, or name another: make PYTHON=/path/to/python'; exit 1; }
	@echo 'installing the locked packages into $(VENV), about 1 GB'
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
