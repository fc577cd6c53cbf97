# Two commands do everything: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# A folder of tars of your own: make demo RAW=some/tars
RAW ?=

.PHONY: install demo test test-slow test-all faults lint format clean

install: $(STAMP)

# uv where it is on the path, pip otherwise; the stamp makes a second call do nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than Python 3.11: give make PYTHON=python3.11" >&2; exit 1; }
	@if command -v uv >/dev/null 2>&1; then \
	    { [ -x $(PY) ] || uv venv --quiet --python $(PYTHON) $(VENV); } && \
	    uv pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[faiss,tune,tensorboard,interop,demo,test]'; \
	else \
	    { [ -x $(PY) ] || $(PYTHON) -m venv $(VENV); } && \
	    $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[faiss,tune,tensorboard,interop,demo,test]'; \
	fi
	@touch $@

demo: install
	@$(PY) sample_data/run_demo.py $(if $(RAW),--raw "$(RAW)")

test: install
	$(PY) -m pytest -m "not slow" --numprocesses auto --dist worksteal

# What takes long: the demo, a real SLURM, every kill, fresh environments, the benchmarks' scripts.
test-slow: install
	$(PY) -m pytest -m slow --numprocesses auto --dist worksteal

test-all: test test-slow

# Every known disturbance, 100 kills among them; docs/reliability.md has the results.
faults: install
	$(PY) tests/faults/run.py --tries 100

lint: install
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: install
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf demo_output
